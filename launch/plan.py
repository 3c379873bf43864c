"""What a run will need and how long it will take: `python -m launch plan CONFIG --nodes N --gpus-per-node M --gpu GPU`.

Arithmetic on the config, with neither torch nor a GPU; docs/planning.md derives the formulas.
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from launch.hardware import COMPUTE_EFFICIENCY, LATENCY_S, LINK_EFFICIENCY, OVERLAP, RESERVED_GIB, Gpu
from pretrain.accounting import (
    LayerCost,
    Layout,
    Memory,
    Transfer,
    cut_evenly,
    layers,
    layout_of,
    memory,
    parcel,
    step_flops,
    transfers,
)
from pretrain.config import Config, load_config, parse_config

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
        """Bytes that they take on the fullest rank."""
        config = _with_engine(self.config, activation_checkpointing=checkpointing)
        held = [memory(config, part, self.layout, number) for number, part in enumerate(self.parts)]
        return max(each.items.get("activations", 0) for each in held)

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.cluster.gpu.memory_gib - RESERVED_GIB


def objection(config: Config, cluster: Cluster) -> str | None:
    """Why the config cannot run on the cluster, memory aside, in one sentence; None if it can."""
    engine, training, grain = config.engine, config.training, config.data.grain
    tp, pp = engine.tensor_parallel, engine.pipeline_parallel
    if cluster.gpus_per_node % tp:
        return (
            f"engine.tensor_parallel {tp} does not divide the {cluster.gpus_per_node} GPUs of a node: set it to a "
            f"divisor."
        )
    known = tp * pp * (engine.data_parallel or 1)
    if cluster.world % known or (engine.data_parallel and cluster.world != known):
        return (
            f"engine.data_parallel {engine.data_parallel or 'null'} x engine.tensor_parallel {tp} x "
            f"engine.pipeline_parallel {pp} does not make up the {cluster.world:,} GPUs of the run: change one of them."
        )
    dp = cluster.world // (tp * pp)
    share = dp * training.accumulation * grain
    if training.global_batch % share:
        return (
            f"training.global_batch {training.global_batch:,} does not divide into whole grains: {dp:,} data-parallel "
            f"ranks x training.accumulation {training.accumulation} x data.grain {grain} = {share:,} must divide it."
        )
    return None


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
    return sorted(plans.values(), key=lambda plan: (plan.step_s, plan.memory_gib))[:count]


def _candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    free = config.objectives.contrastive.negatives == "global_batch"
    accumulations = [2**power for power in range(9)] if free else [config.training.accumulation]
    for tp in _divisors(cluster.gpus_per_node):
        for pp in [size for size in _divisors(cluster.world // tp) if size <= min(config.num_layers, 64)]:
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def run_plan(
    path: Path | None,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    vocabulary: int | None = None,
    run: Path | None = None,
    as_json: bool = False,
) -> int:
    """Prints the plan; returns the exit code: 0 if the run is possible and fits, else 4.

    Raises:
        UserError: the config cannot be used, or the run to compare with cannot be read.
    """
    if path is None and run is None:
        raise UserError("There is nothing to plan: give a CONFIG, or --compare RUN.")
    config = load_config(path or _of_run(run, "config.yaml"), overrides)
    pieces, counted_from = count_pieces(config.data.tokenizer, vocabulary)
    reason = objection(config, cluster)
    plan = None if reason else make_plan(config, cluster, layers(config, pieces))
    if plan and not plan.fits:
        room = cluster.gpu.memory_gib - RESERVED_GIB
        reason = (
            f"A rank holds {plan.memory_gib:.1f} GiB at its fullest, and a GPU of {cluster.gpu.memory_gib:g} GiB has "
            f"room for {room:g}: take one of the layouts below, or more GPUs."
        )
    best = best_layouts(config, cluster, pieces)
    compared = compare(plan, run) if plan and run else {}
    if as_json:
        print(json.dumps(summary(config, cluster, pieces, plan, reason, best, compared), indent=2))
    else:
        print("\n".join(report(config, cluster, pieces, counted_from, plan, reason, best, compared)))
    return 4 if reason else 0


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


def _of_run(run: Path | None, name: str) -> Path:
    assert run is not None
    if not (run / name).is_file():
        raise UserError(f"--compare {run} holds no {name}: give the output folder of a run.")
    return run / name


def compare(plan: Plan, run: Path) -> dict[str, tuple[float, float]]:
    """Prediction and measurement of a run, by name. Of its steps the median counts, the first tenth left out.

    Raises:
        UserError: the folder is not that of a run, or of one of another model, batch or objective.
    """
    its = load_config(_of_run(run, "config.yaml"))
    for section in ("model", "objectives", "training", "engine"):
        ours, theirs = (getattr(config, section).model_dump() for config in (plan.config, its))
        for key in (key for key in ours if ours[key] != theirs[key] and key in _COMPARED.get(section, ours)):
            raise UserError(
                f"--compare {run}: {section}.{key} was {theirs[key]} there and is {ours[key]} in the plan: plan "
                f"{run / 'config.yaml'}."
            )
    lines = _of_run(run, "metrics.jsonl").read_text().splitlines()
    steps = [values for values in map(json.loads, lines) if "time/step_s" in values]
    steps = steps[len(steps) // 10 :]
    if not steps:
        raise UserError(f"--compare {run}: metrics.jsonl holds no step yet.")
    step_s = statistics.median(values["time/step_s"] for values in steps)
    per_gpu = plan.model_flops * plan.config.training.global_batch / plan.cluster.world / 1e12
    return {
        "seconds a step": (plan.step_s, step_s),
        "samples/s": (plan.samples_per_s, plan.config.training.global_batch / step_s),
        "TFLOP/s a GPU": (per_gpu / plan.step_s, per_gpu / step_s),
        "peak memory, GiB": (plan.memory_gib, max(values["memory/peak_gib"] for values in steps)),
    }


# What must be equal for a comparison, of the sections that hold other things too.
_COMPARED = {"training": ("global_batch", "accumulation")}


def report(
    config: Config,
    cluster: Cluster,
    vocabulary: int,
    counted_from: str,
    plan: Plan | None,
    reason: str | None,
    best: Sequence[Plan],
    compared: dict[str, tuple[float, float]],
) -> list[str]:
    """The plan as lines for a terminal."""
    gpu, costs = cluster.gpu, layers(config, vocabulary)
    parameters = sum(cost.parameters for cost in costs)
    lines = [
        f"{parameters / 1e9:.2f} B parameters in {len(costs)} layers, vocabulary {vocabulary:,} ({counted_from})",
        f"{cluster.nodes:,} x {cluster.gpus_per_node} = {cluster.world:,} GPUs {gpu.name}: {gpu.tflops:g} TFLOP/s, "
        f"{gpu.memory_gib:g} GiB, NVLink {gpu.nvlink_gb_s:g} GB/s, network {gpu.network_gb_s:g} GB/s",
        "",
        f"NOT POSSIBLE  {reason}" if reason else "possible, and fits",
    ]
    if plan:
        lines += ["", *_layout_lines(plan), "", *_memory_lines(plan), "", *_flops_lines(costs)]
        lines += ["", *_exchange_lines(plan), "", *_time_lines(plan)]
    if compared:
        lines += ["", *_table(["against the run", "predicted", "measured", "ratio"], _compared_rows(compared))]
    lines += ["", *_best_lines(best), "", *_assumption_lines()]
    return lines


def _layout_lines(plan: Plan) -> list[str]:
    layout, engine = plan.layout, plan.config.engine
    return [
        f"data {layout.data_parallel:,} x tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel}, "
        f"ZeRO {engine.zero_stage}, activation checkpointing {'on' if engine.activation_checkpointing else 'off'}, "
        f"offload {engine.offload}",
        f"global batch {plan.config.training.global_batch:,} = {layout.data_parallel:,} ranks x "
        f"{layout.micro_steps} micro-steps x {layout.micro_batch} samples",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    rows = [[name, f"{size / GIB:.2f}"] for name, size in plan.memory.items.items()]
    rows += [["in all", f"{plan.memory_gib:.2f}"]]
    rows += [["activations without checkpointing", f"{plan.activations(checkpointing=False) / GIB:.2f}"]]
    rows += [["activations with checkpointing", f"{plan.activations(checkpointing=True) / GIB:.2f}"]]
    return _table([f"memory of a GPU, {plan.memory.moment}", "GiB"], rows)


def _flops_lines(costs: Sequence[LayerCost]) -> list[str]:
    totals: dict[tuple[str, ...], float] = {}
    for cost in costs:
        for needed, flops in cost.flops.items():
            totals[needed] = totals.get(needed, 0) + 3 * flops
    everything = sum(totals.values())
    rows = [
        [
            " + ".join(needed) + (" alone" if len(needed) == 1 else ""),
            f"{flops / 1e12:.3f}",
            f"{flops / everything:.1%}",
        ]
        for needed, flops in sorted(totals.items(), key=lambda item: -item[1])
    ]
    rows.append(["in all", f"{everything / 1e12:.3f}", ""])
    return _table(["one pass of training, needed by", "TFLOP a sample", "share"], rows)


def _exchange_lines(plan: Plan) -> list[str]:
    rows = [
        [
            each.transfer.what,
            each.transfer.kind,
            f"{each.transfer.axis}, {each.link}",
            f"{each.transfer.size / 1e9:.3f}",
            f"{each.time_s:.4f}",
            f"{each.exposed_s:.4f}",
        ]
        for each in plan.exchanges
    ]
    return _table(["exchanged in a step", "kind", "axis, link", "GB", "s", "exposed s"], rows)


def _time_lines(plan: Plan) -> list[str]:
    exposed_s = sum(each.exposed_s for each in plan.exchanges)
    steps, training = plan.config.training.steps, plan.config.training
    rows = [
        ["computing", f"{plan.compute_s:.3f} s"],
        ["exposed communication", f"{exposed_s:.3f} s"],
        ["pipeline bubble", f"{plan.bubble_s:.3f} s"],
        ["a step", f"{plan.step_s:.3f} s"],
        ["samples/s", f"{plan.samples_per_s:,.0f}"],
        ["model FLOPs utilisation", f"{plan.mfu:.1%}"],
        [f"{steps:,} steps, {steps * training.global_batch / 1e6:,.0f} M samples", f"{plan.hours / 24:,.2f} days"],
        ["GPU-hours", f"{plan.hours * plan.cluster.world:,.0f}"],
    ]
    return _table(["time", ""], rows)


def _compared_rows(compared: dict[str, tuple[float, float]]) -> list[list[str]]:
    return [
        [name, f"{predicted:.4g}", f"{measured:.4g}", f"{predicted / measured:.2f}"]
        for name, (predicted, measured) in compared.items()
    ]


def _best_lines(best: Sequence[Plan]) -> list[str]:
    if not best:
        return ["No layout of this global batch fits the cluster: take more GPUs, or another batch."]
    rows = []
    for plan in best:
        engine, layout = plan.config.engine, plan.layout
        again = "on" if engine.activation_checkpointing else "off"
        degrees = [layout.data_parallel, layout.tensor_parallel, layout.pipeline_parallel, engine.zero_stage]
        row = [*map(str, degrees), again, str(layout.micro_steps)]
        rows.append([*row, f"{plan.step_s:.3f}", f"{plan.mfu:.1%}", f"{plan.memory_gib:.1f}"])
    head = ["data", "tensor", "pipeline", "ZeRO", "checkpointing", "accumulation", "s a step", "MFU", "GiB"]
    return ["best layouts of the same optimisation", *_table(head, rows)]


def _overrides(plan: Plan) -> str:
    """A layout as overrides on a command line."""
    engine = plan.config.engine
    return (
        f"engine.tensor_parallel={engine.tensor_parallel} engine.pipeline_parallel={engine.pipeline_parallel} "
        f"engine.zero_stage={engine.zero_stage} "
        f"engine.activation_checkpointing={str(engine.activation_checkpointing).lower()} "
        f"training.accumulation={plan.layout.micro_steps}"
    )


def _assumption_lines() -> list[str]:
    return [
        "Taken for granted, with sources in launch/hardware.py:",
        f"computing at {COMPUTE_EFFICIENCY:.0%} of the peak, links at {LINK_EFFICIENCY:.0%}, "
        f"{LATENCY_S * 1e6:g} us for each message and doubling of ranks,",
        f"overlapped transfers hidden behind {OVERLAP:.0%} of the computing, {RESERVED_GIB} GiB of a GPU kept free.",
        "docs/planning.md derives the rest. Tests hold memory and bytes against measurements; times are not measured.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column and _is_number(rows[0][column]) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)]


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()


def summary(
    config: Config,
    cluster: Cluster,
    vocabulary: int,
    plan: Plan | None,
    reason: str | None,
    best: Sequence[Plan],
    compared: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """The plan for a machine. Units are in the names; the best layouts are overrides."""
    costs = layers(config, vocabulary)
    found: dict[str, Any] = {
        "possible": reason is None,
        "reason": reason,
        "parameters": sum(cost.parameters for cost in costs),
        "vocabulary": vocabulary,
        "gpus": cluster.world,
    }
    if plan:
        found |= {
            "memory_moment": plan.memory.moment,
            "memory_bytes": dict(plan.memory.items) | {"in all": plan.memory.total},
            "activation_bytes": {
                "without checkpointing": plan.activations(checkpointing=False),
                "with checkpointing": plan.activations(checkpointing=True),
            },
            "flops_per_sample": plan.model_flops,
            "exchanges": [
                {
                    "what": each.transfer.what,
                    "kind": each.transfer.kind,
                    "axis": each.transfer.axis,
                    "link": each.link,
                    "bytes": each.transfer.size,
                    "time_s": each.time_s,
                    "exposed_s": each.exposed_s,
                }
                for each in plan.exchanges
            ],
            "compute_s": plan.compute_s,
            "bubble_s": plan.bubble_s,
            "step_s": plan.step_s,
            "samples_per_s": plan.samples_per_s,
            "mfu": plan.mfu,
            "days": plan.hours / 24,
            "gpu_hours": plan.hours * cluster.world,
        }
    found["best"] = [
        {"overrides": _overrides(each).split(), "step_s": each.step_s, "memory_gib": each.memory_gib} for each in best
    ]
    if compared:
        found["compared"] = {name: {"predicted": p, "measured": m} for name, (p, m) in compared.items()}
    return found
