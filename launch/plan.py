"""What a run will need and how long it will take, and which layouts of it are the fastest.

Layers are measured on the meta device, without a GPU; the rest is arithmetic, which docs/planning.md derives.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from launch.hardware import (
    COMPUTE_EFFICIENCY,
    DECODED_PER_CORE_S,
    HOST_S,
    LINK_EFFICIENCY,
    OVERLAP,
    RESERVED_GIB,
    TIME_ERROR,
    Gpu,
    latency_s,
)
from pretrain.accounting.exchange import transfers
from pretrain.accounting.layers import Layout, StepCost, Transfer, measure_forward, measure_step
from pretrain.accounting.memory import Memory, Rank
from pretrain.accounting.stages import cut_evenly, layout_of
from pretrain.config import Config, EngineConfig, parse_config
from pretrain.models.towers import Vocabulary

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


class Costs:
    """What has been measured of a model, once for all layouts of a step that cost the same."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        self.config, self.vocabulary = config, Vocabulary(vocabulary)
        self.forward = measure_forward(config, self.vocabulary)
        self._steps: dict[tuple[int, int, bool], tuple[int, StepCost]] = {}

    def step(self, config: Config, layout: Layout) -> StepCost:
        """Of a layout of the same optimisation."""
        key = layout.data_parallel, layout.tensor_parallel, config.engine.activation_checkpointing
        if key not in self._steps:
            self._steps[key] = layout.micro_steps, measure_step(config, self.vocabulary, layout)
        steps, cost = self._steps[key]
        return cost if steps == layout.micro_steps else cost.in_steps(layout.micro_steps / steps)

    @cached_property
    def least_kept(self) -> float:
        """Bytes per sample that wait for the backward pass even if activations are computed again."""
        config = _with_engine(self.config, activation_checkpointing=True)
        cost = measure_step(config, self.vocabulary, Layout(1, 1, 1, self.config.data.grain, 1))
        return sum(layer.kept for layer in cost.layers) / self.config.data.grain

    @property
    def flops(self) -> float:
        """Of a sample in training, without what is computed again: 3 forward passes."""
        return 3 * sum(self.forward.flops.values())

    @property
    def flops_alone(self) -> dict[str, float]:
        """What of them each objective needs that no other one does."""
        names = [name for name, section in self.config.objectives if section]
        left = {name: measure_forward(self.config, self.vocabulary, name).flops for name in names}
        return {name: self.flops - 3 * sum(flops.values()) for name, flops in left.items()}


@dataclass(frozen=True)
class Exchange:
    """A transfer of the busiest pipeline stage and how long it takes."""

    transfer: Transfer
    link: str  # NVLink or network
    time_s: float
    exposed_s: float
    """What no computing hides."""
    host_s: float
    """What the processor is busy with it."""


@dataclass(frozen=True)
class Plan:
    """What one layout of a run is predicted to need. Times and volumes are those of an optimizer step."""

    config: Config
    cluster: Cluster
    layout: Layout
    memory: Memory
    """Of the fullest rank."""
    costs: Costs
    parts: list[range]
    """The layers of each pipeline stage."""
    compute_s: float
    bubble_s: float
    exchanges: list[Exchange]

    @property
    def device_s(self) -> float:
        """What the GPU takes for a step."""
        return self.compute_s + self.bubble_s + sum(exchange.exposed_s for exchange in self.exchanges)

    @property
    def host_s(self) -> float:
        """What DeepSpeed's own work on the processor takes, which goes on meanwhile."""
        return sum(exchange.host_s for exchange in self.exchanges)

    @property
    def step_s(self) -> float:
        return max(self.device_s, self.host_s)

    @property
    def samples_per_s(self) -> float:
        return self.config.training.global_batch / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation. Source: Chowdhery et al., PaLM (2022), section 4.1."""
        return self.costs.flops * self.samples_per_s / (self.cluster.world * self.cluster.gpu.tflops * 1e12)

    @property
    def hours(self) -> float:
        return self.config.training.steps * self.step_s / 3600

    @property
    def memory_gib(self) -> float:
        return self.memory.total / GIB

    def activations(self, checkpointing: bool) -> float:
        """Bytes that they take at the most in the backward pass, on the rank that has the most."""
        config = _with_engine(self.config, activation_checkpointing=checkpointing)
        cost = self.costs.step(config, self.layout)
        return max(Rank(config, cost, self.layout, part, stage).activations for stage, part in enumerate(self.parts))

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


def make_plan(config: Config, cluster: Cluster, costs: Costs) -> Plan:
    """Predicts a run that `objection` has nothing against."""
    layout = layout_of(config, cluster.world)
    cost, parts = costs.step(config, layout), cut_evenly(tuple(costs.forward.flops.values()), layout.pipeline_parallel)
    timed: list[tuple[float, float, list[Exchange]]] = []
    for part in parts:
        flops = sum(layer.flops for layer in cost.layers[part.start : part.stop])
        compute_s = flops / (cluster.gpu.tflops * 1e12 * COMPUTE_EFFICIENCY)
        exchanges = [_exchange(transfer, layout, cluster) for transfer in transfers(config, cost, layout, part)]
        exchanges = _hide(exchanges, compute_s)
        inside_s = compute_s + sum(e.exposed_s for e in exchanges if e.transfer.axis != "dp")
        timed.append((inside_s, compute_s, exchanges))
    inside_s, compute_s, exchanges = max(timed, key=lambda stage: stage[0])  # the others wait for it
    memories = [Rank(config, cost, layout, part, stage).memory for stage, part in enumerate(parts)]
    return Plan(
        config=config,
        cluster=cluster,
        layout=layout,
        memory=max(memories, key=lambda held: held.total),
        costs=costs,
        parts=parts,
        compute_s=compute_s,
        bubble_s=inside_s * (layout.pipeline_parallel - 1) / layout.micro_steps,
        exchanges=exchanges,
    )


def _exchange(transfer: Transfer, layout: Layout, cluster: Cluster) -> Exchange:
    """How long a transfer takes on the links that its axis lies on."""
    tp, dp, gpu = layout.tensor_parallel, layout.data_parallel, cluster.gpu
    ranks = {"tp": tp, "dp": dp, "pp": layout.pipeline_parallel}[transfer.axis]
    # Ranks of the axis inside one node. Their rings cross to the next node through all of their adapters.
    together = {"tp": tp, "dp": min(dp, cluster.gpus_per_node // tp), "pp": 1}[transfer.axis]
    inside = {"tp": True, "dp": dp * tp <= cluster.gpus_per_node, "pp": 2 * dp * tp <= cluster.gpus_per_node}
    if inside[transfer.axis]:
        link, bandwidth = "NVLink", gpu.nvlink_gb_s
    elif transfer.kind in ("all-to-all", "point-to-point"):
        link, bandwidth = "network", gpu.network_gb_s
    else:
        link, bandwidth = "network", min(gpu.nvlink_gb_s, together * gpu.network_gb_s)
    passes = {"all-reduce": 2 * (ranks - 1) / ranks, "point-to-point": 1, "broadcast": 1}
    time_s = passes.get(transfer.kind, (ranks - 1) / ranks) * transfer.size / (bandwidth * 1e9 * LINK_EFFICIENCY)
    time_s += transfer.messages * latency_s(transfer.kind, ranks, 1 if link == "NVLink" else ranks // together)
    host_s = transfer.parameters * ranks * HOST_S.get(transfer.kind, 0)
    return Exchange(transfer, link, time_s, time_s, host_s)


def _hide(exchanges: list[Exchange], compute_s: float) -> list[Exchange]:
    """What runs while the GPU computes is exposed only as far as it takes longer, all of it together."""
    left_s, hidden = OVERLAP * compute_s, []
    for each in exchanges:
        if each.transfer.overlapped:
            each = replace(each, exposed_s=max(each.time_s - left_s, 0))
            left_s = max(left_s - each.time_s, 0)
        hidden.append(each)
    return hidden


def best_layouts(config: Config, cluster: Cluster, costs: Costs, count: int = 3) -> list[Plan]:
    """The fastest layouts of the same optimisation on the cluster, among those that fit.

    Of ZeRO's stages the lowest that the plan cannot tell from the fastest: it partitions no more than it must.
    Activations are computed again where they would not fit else.

    The global batch stays. Accumulation stays too, unless negatives are the global batch's and it changes nothing.
    """
    plans: dict[EngineConfig, Plan] = {}
    for candidate in _candidates(config, cluster, len(costs.forward.flops)):
        engine = candidate.engine
        if engine in plans and engine.pipeline_parallel == 1:
            continue  # more micro-steps than fit would only take longer
        if engine.activation_checkpointing and engine.model_copy(update={"activation_checkpointing": False}) in plans:
            continue
        layout = layout_of(candidate, cluster.world)
        least = layout.micro_batch * costs.least_kept / (layout.tensor_parallel * layout.pipeline_parallel)
        if least > cluster.gpu.memory_gib * GIB:
            continue  # and thousands of samples take long to measure
        plan = make_plan(candidate, cluster, costs)
        if plan.fits and (engine not in plans or plan.step_s < plans[engine].step_s):
            plans[engine] = plan
    alike: dict[EngineConfig, list[Plan]] = {}  # but for the stage
    for engine, plan in plans.items():
        alike.setdefault(engine.model_copy(update={"zero_stage": 0}), []).append(plan)
    chosen: list[tuple[float, float, Plan]] = []
    for group in alike.values():
        fastest_s = min(plan.step_s for plan in group)
        near = [plan for plan in group if plan.step_s <= fastest_s * (1 + TIME_ERROR)]
        plan = min(near, key=lambda plan: (plan.config.engine.zero_stage, plan.step_s))
        chosen.append((fastest_s, plan.memory_gib, plan))
    return [plan for *_, plan in sorted(chosen, key=itemgetter(0, 1))[:count]]


def _candidates(config: Config, cluster: Cluster, num_layers: int) -> Iterator[Config]:
    contrastive = config.objectives.contrastive
    free = contrastive is not None and contrastive.negatives == "global_batch"
    accumulations = [2**power for power in range(9)] if free else [config.training.accumulation]
    for tp in divisors(cluster.gpus_per_node):
        for pp in [size for size in divisors(cluster.world // tp) if size <= min(num_layers, 64)]:
            # Most of a pipeline with fewer micro-steps than stages would stand still.
            for accumulation in [number for number in accumulations if number >= pp or pp == 1]:
                for stage, again in product((0, 1) if pp > 1 else (0, 1, 2, 3), (False, True)):
                    tree = config.model_dump()
                    tree["training"]["accumulation"] = accumulation
                    tree["engine"] |= {
                        "data_parallel": None,
                        "tensor_parallel": tp,
                        "pipeline_parallel": pp,
                        "zero_stage": stage,
                        "activation_checkpointing": again,
                    }
                    with contextlib.suppress(UserError):  # whatever the config's own rules refuse
                        changed = parse_config(tree, "")
                        if objection(changed, cluster) is None:
                            yield changed


def _with_engine(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


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
