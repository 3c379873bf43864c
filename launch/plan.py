"""What a run will need and how long it will take, and which layouts of it are the fastest.

Arithmetic on the config, with neither torch nor a GPU; docs/planning.md derives the formulas.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from launch.hardware import (
    COMPUTE_EFFICIENCY,
    DECODED_PER_CORE_S,
    LATENCY_S,
    LINK_EFFICIENCY,
    OVERLAP,
    RESERVED_GIB,
    TIME_ERROR,
    Gpu,
)
from pretrain.accounting.exchange import Transfer, parcel, transfers
from pretrain.accounting.layers import LayerCost, layers
from pretrain.accounting.memory import Memory, activations, memory
from pretrain.accounting.stages import Layout, cut_evenly, layout_of, step_flops
from pretrain.config import Config, parse_config

VOCABULARY = 32_000  # where there is no tokenizer yet
GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Exchange:
    """A transfer of the busiest pipeline stage and how long it takes."""

    transfer: Transfer
    link: str  # NVLink or network
    time_s: float
    exposed_s: float
    """What no computing hides."""


@dataclass(frozen=True)
class Plan:
    """What one layout of a run is predicted to need. Times and volumes are those of an optimizer step."""

    config: Config
    cluster: Cluster
    layout: Layout
    memory: Memory
    """Of the fullest rank."""
    parts: list[list[LayerCost]]
    """The layers of each pipeline stage."""
    model_flops: float
    """FLOPs a sample without what is computed again: 3 forward passes."""
    compute_s: float
    bubble_s: float
    exchanges: list[Exchange]

    @property
    def step_s(self) -> float:
        return self.compute_s + self.bubble_s + sum(exchange.exposed_s for exchange in self.exchanges)

    @property
    def samples_per_s(self) -> float:
        return self.config.training.global_batch / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation. Source: Chowdhery et al., PaLM (2022), section 4.1."""
        return self.model_flops * self.samples_per_s / (self.cluster.world * self.cluster.gpu.tflops * 1e12)

    @property
    def hours(self) -> float:
        return self.config.training.steps * self.step_s / 3600

    @property
    def memory_gib(self) -> float:
        return self.memory.total / GIB

    def activations(self, checkpointing: bool) -> float:
        """Bytes that they take at the most in the backward pass, on the rank that has the most."""
        config = _with_engine(self.config, activation_checkpointing=checkpointing)
        return max(activations(config, part, self.layout, number) for number, part in enumerate(self.parts))

    @property
    def decoding_cores(self) -> float:
        """Cores of a node that its GPUs keep busy with decoding. Each rank decodes its own samples."""
        per_rank = self.samples_per_s / self.layout.data_parallel
        return per_rank * self.cluster.gpus_per_node / DECODED_PER_CORE_S

    def is_laid_out_as(self, other: "Plan") -> bool:
        """Whether both are one layout, of one memory and time."""
        return (
            self.layout == other.layout
            and self.config.engine.model_copy(update={"data_parallel": other.config.engine.data_parallel})
            == other.config.engine
        )

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.cluster.gpu.memory_gib - RESERVED_GIB


def objection(config: Config, cluster: Cluster) -> str | None:
    """Why the config cannot run on the cluster, memory aside, in one sentence; None if it can."""
    engine, training = config.engine, config.training
    tp, pp = engine.tensor_parallel, engine.pipeline_parallel
    if cluster.gpus_per_node % tp:
        return (
            f"engine.tensor_parallel {tp} does not divide the {cluster.gpus_per_node} GPUs of a node: set it to a "
            f"divisor."
        )
    if misfit := engine.misfit(cluster.world, "GPUs"):
        return misfit
    return config.data.misfit(training.global_batch, training.accumulation, cluster.world // (tp * pp))


def make_plan(config: Config, cluster: Cluster, costs: Sequence[LayerCost]) -> Plan:
    """Predicts a run that `objection` has nothing against, of a model of the layers `costs`."""
    layout = layout_of(config, cluster.world)
    cuts = cut_evenly(tuple(cost.forward_flops for cost in costs), layout.pipeline_parallel)
    parts = [list(costs[cut.start : cut.stop]) for cut in cuts]
    borders = [(parcel(config, costs, cut.start), parcel(config, costs, cut.stop)) for cut in cuts]

    gpu = cluster.gpu
    per_gpu = layout.micro_batch * layout.micro_steps / layout.tensor_parallel
    rate = gpu.tflops * 1e12 * COMPUTE_EFFICIENCY
    timed: list[tuple[float, float, list[Exchange]]] = []
    for part, border in zip(parts, borders, strict=True):
        compute_s = per_gpu * step_flops(config, part) / rate
        exchanges = [_exchange(transfer, layout, cluster) for transfer in transfers(config, part, layout, border)]
        exchanges = _hide(exchanges, compute_s)
        inside_s = compute_s + sum(e.exposed_s for e in exchanges if e.transfer.axis != "dp")
        timed.append((inside_s, compute_s, exchanges))
    inside_s, compute_s, exchanges = max(timed, key=lambda stage: stage[0])  # the others wait for it
    memories = [memory(config, part, layout, number) for number, part in enumerate(parts)]
    return Plan(
        config=config,
        cluster=cluster,
        layout=layout,
        memory=max(memories, key=lambda held: held.total),
        parts=parts,
        model_flops=3 * sum(cost.forward_flops for cost in costs),
        compute_s=compute_s,
        bubble_s=inside_s * (layout.pipeline_parallel - 1) / layout.micro_steps,
        exchanges=exchanges,
    )


def _exchange(transfer: Transfer, layout: Layout, cluster: Cluster) -> Exchange:
    """How long a transfer takes on the links that its axis lies on."""
    tp, dp, gpu = layout.tensor_parallel, layout.data_parallel, cluster.gpu
    ranks = {"tp": tp, "dp": dp, "pp": 2}[transfer.axis]
    # Ranks of the axis inside one node. Their rings cross to the next node through all of their adapters.
    together = {"tp": tp, "dp": min(dp, cluster.gpus_per_node // tp), "pp": 1}[transfer.axis]
    inside = {"tp": True, "dp": dp * tp <= cluster.gpus_per_node, "pp": 2 * dp * tp <= cluster.gpus_per_node}
    if inside[transfer.axis]:
        link, bandwidth = "NVLink", gpu.nvlink_gb_s
    elif transfer.kind in ("all-to-all", "point-to-point"):
        link, bandwidth = "network", gpu.network_gb_s
    else:
        link, bandwidth = "network", min(gpu.nvlink_gb_s, together * gpu.network_gb_s)
    passes = {"all-reduce": 2 * (ranks - 1) / ranks, "point-to-point": 1}.get(transfer.kind, (ranks - 1) / ranks)
    time_s = passes * transfer.size / (bandwidth * 1e9 * LINK_EFFICIENCY)
    time_s += transfer.messages * LATENCY_S * math.log2(ranks)
    return Exchange(transfer, link, time_s, time_s)


def _hide(exchanges: list[Exchange], compute_s: float) -> list[Exchange]:
    """What runs while the GPU computes is exposed only as far as it takes longer, all of it together."""
    left_s, hidden = OVERLAP * compute_s, []
    for each in exchanges:
        if each.transfer.overlapped:
            each = replace(each, exposed_s=max(each.time_s - left_s, 0))
            left_s = max(left_s - each.time_s, 0)
        hidden.append(each)
    return hidden


def best_layouts(config: Config, cluster: Cluster, vocabulary: int, count: int = 3) -> list[Plan]:
    """The fastest layouts of the same optimisation on the cluster, among those that fit.

    Of ZeRO's stages the lowest that the plan cannot tell from the fastest: it partitions no more than it must.

    The global batch stays. Accumulation stays too, unless negatives are the global batch's and it changes nothing.
    """
    costs = layers(config, vocabulary)  # of all candidates: what they contrast does not change
    plans: dict[str, Plan] = {}
    for candidate in _candidates(config, cluster):
        engine = str(candidate.engine)
        if engine in plans and candidate.engine.pipeline_parallel == 1:
            continue  # more micro-steps than fit would only take longer
        plan = make_plan(candidate, cluster, costs)
        if plan.fits and (engine not in plans or plan.step_s < plans[engine].step_s):
            plans[engine] = plan
    alike: dict[tuple[object, ...], list[Plan]] = {}  # but for the stage
    for plan in plans.values():
        engine = plan.config.engine
        cut = (engine.pipeline_parallel, engine.tensor_parallel, engine.activation_checkpointing)
        alike.setdefault(cut, []).append(plan)
    chosen: list[tuple[float, Plan]] = []
    for group in alike.values():
        fastest_s = min(plan.step_s for plan in group)
        near = [plan for plan in group if plan.step_s <= fastest_s * (1 + TIME_ERROR)]
        chosen.append((fastest_s, min(near, key=lambda plan: (plan.config.engine.zero_stage, plan.step_s))))
    return [plan for _, plan in sorted(chosen, key=lambda found: (found[0], found[1].memory_gib))[:count]]


def _candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    free = config.objectives.contrastive.negatives == "global_batch"
    accumulations = [2**power for power in range(9)] if free else [config.training.accumulation]
    for tp in divisors(cluster.gpus_per_node):
        for pp in [size for size in divisors(cluster.world // tp) if size <= min(config.num_layers, 64)]:
            for accumulation in accumulations:
                if pp > 1 and accumulation < pp:  # most of the pipeline would stand still
                    continue
                for stage in (0, 1) if pp > 1 else (0, 1, 2, 3):
                    for again in (False, True):
                        changed = _with_engine(
                            config,
                            data_parallel=None,
                            tensor_parallel=tp,
                            pipeline_parallel=pp,
                            zero_stage=stage,
                            activation_checkpointing=again,
                        )
                        training = changed.training.model_copy(update={"accumulation": accumulation})
                        changed = changed.model_copy(update={"training": training})
                        if objection(changed, cluster) is None and _loads(changed):
                            yield changed


def _with_engine(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


def _loads(config: Config) -> bool:
    """Whether the config's own rules hold, which a copy does not check."""
    try:
        parse_config(config.model_dump(), "")
    except UserError:
        return False
    return True


def divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def count_pieces(tokenizer: Path, given: int | None) -> tuple[int, str]:
    """Tokens of the vocabulary, and where that number comes from."""
    if given:
        return given, "as given"
    # Each is imported only if it is asked: they take longer than the plan.
    if tokenizer.is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(tokenizer)).GetPieceSize(), f"read from {tokenizer}"
    if (model := tokenizer / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(model)).get_vocab_size(), f"read from {tokenizer}"
    return VOCABULARY, f"a guess: there is no {tokenizer} yet, and --vocabulary is not given"
