"""`python -m launch plan CONFIG --nodes N --gpus-per-node M --gpu GPU`: a plan printed, or set beside a run."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.text import to_json
from launch.hardware import (
    COMPUTE_EFFICIENCY,
    DECODED_PER_CORE_S,
    LINK_EFFICIENCY,
    OVERLAP,
    RESERVED_GIB,
    TIME_ERROR,
    find_gpu,
)
from launch.plan import GIB, Cluster, Costs, Plan, best_layouts, count_pieces, make_plan, objection
from pretrain.config import Config, load_config

# What must be equal for a comparison, of the sections that hold other things too.
_COMPARED = {"training": ("global_batch", "accumulation")}


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
    costs = Costs(config, pieces)
    plan, reason, best = judge(config, cluster, costs)
    compared = compare(plan, run) if plan and run else {}
    if as_json:
        print(to_json(summary(config, cluster, costs, plan, reason, best, compared), indent=2))
    else:
        print("\n".join(report(config, cluster, costs, counted_from, plan, reason, best, compared)))
    return 4 if reason else 0


def judge(config: Config, cluster: Cluster, costs: Costs) -> tuple[Plan | None, str | None, Sequence[Plan]]:
    """The plan, if the run is possible; why it cannot work, or None; and the best layouts for this cluster."""
    reason = objection(config, cluster)
    plan = None if reason else make_plan(config, cluster, costs)
    best = best_layouts(config, cluster, costs)
    if plan and not plan.fits:
        room = cluster.gpu.memory_gib - RESERVED_GIB
        fix = "take one of the layouts below" if best else "no layout of this global batch fits, so take more GPUs"
        reason = (
            f"A rank holds {plan.memory_gib:.1f} GiB at its fullest, and a GPU of {cluster.gpu.memory_gib:g} GiB has "
            f"room for {room:g}: {fix}, or a smaller model or batch."
        )
    return plan, reason, best


def refuse_what_does_not_fit(config: Config) -> None:
    """Plans the run on the cluster that its section `slurm` asks for.

    Raises:
        UserError: it cannot work, or does not fit; with the best layouts, if there are any.
    """
    slurm = config.slurm
    cluster = Cluster(slurm.nodes, slurm.gpus_per_node, find_gpu(slurm.gpu))
    plan, reason, best = judge(config, cluster, Costs(config, count_pieces(config.data.tokenizer, None)[0]))
    if reason:
        raise UserError("\n".join([f"Not submitted. {reason}", *(layout_lines(best, plan, config) if best else [])]))


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
    per_gpu = plan.costs.flops * plan.config.training.global_batch / plan.cluster.world / 1e12
    return {
        "seconds per step": (plan.step_s, step_s),
        "samples/s": (plan.samples_per_s, plan.config.training.global_batch / step_s),
        "TFLOP/s per GPU": (per_gpu / plan.step_s, per_gpu / step_s),
        "peak memory, GiB": (plan.memory_gib, max(values["memory/peak_gib"] for values in steps)),
    }


def report(
    config: Config,
    cluster: Cluster,
    costs: Costs,
    counted_from: str,
    plan: Plan | None,
    reason: str | None,
    best: Sequence[Plan],
    compared: dict[str, tuple[float, float]],
) -> list[str]:
    """The plan as lines for a terminal."""
    gpu = cluster.gpu
    lines = [
        f"{costs.forward.parameters / 1e9:.2f} B parameters in {len(costs.forward.flops)} layers, vocabulary "
        f"{costs.vocabulary.size:,} ({counted_from})",
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
    if best:
        lines += ["", *layout_lines(best, plan, config)]
    return [*lines, "", *_assumption_lines()]


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
    for name, checkpointing in (("without", False), ("with", True)):
        held = f"{plan.activations(checkpointing) / GIB:.2f}"
        rows += [[f"activations in the backward pass, {name} checkpointing", held]]
    return _table([f"memory of a GPU, {plan.memory.moment}", "GiB"], rows)


def _flops_lines(costs: Costs) -> list[str]:
    everything, alone = costs.flops, costs.flops_alone
    shared = everything - sum(alone.values())
    found = [(f"{name} alone", flops) for name, flops in alone.items()]
    found += [("more than one objective", shared)] if shared else []
    found.sort(key=lambda row: -row[1])
    rows = [[needed, f"{flops / 1e12:.3f}", f"{flops / everything:.1%}"] for needed, flops in found]
    rows.append(["in all", f"{everything / 1e12:.3f}", ""])
    return _table(["one pass of training, needed by", "TFLOP per sample", "share"], rows)


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
    if not rows:
        return ["nothing is exchanged: there is one rank"]
    return _table(["exchanged in a step", "kind", "axis, link", "GB", "s", "exposed s"], rows)


def _time_lines(plan: Plan) -> list[str]:
    exposed_s = sum(each.exposed_s for each in plan.exchanges)
    steps, training = plan.config.training.steps, plan.config.training
    rows = [
        ["computing", f"{plan.compute_s:.3f} s"],
        ["exposed communication", f"{exposed_s:.3f} s"],
        ["pipeline bubble", f"{plan.bubble_s:.3f} s"],
        ["the processor's part in ZeRO-3, meanwhile", f"{plan.host_s:.3f} s"],
        ["a step", f"{plan.step_s:.3f} s"],
        ["samples/s", f"{plan.samples_per_s:,.0f}"],
        ["model FLOPs utilisation", f"{plan.mfu:.1%}"],
        [f"{steps:,} steps, {steps * training.global_batch / 1e6:,.1f} M samples", f"{plan.hours:,.1f} h"],
        ["GPU-hours", f"{plan.hours * plan.cluster.world:,.0f}"],
        ["cores of a node that decode", f"{plan.decoding_cores:,.1f}"],
    ]
    return _table(["time", ""], rows)


def _compared_rows(compared: dict[str, tuple[float, float]]) -> list[list[str]]:
    return [
        [name, f"{predicted:.4g}", f"{measured:.4g}", f"{predicted / measured:.2f}"]
        for name, (predicted, measured) in compared.items()
    ]


def layout_lines(best: Sequence[Plan], asked: Plan | None, config: Config) -> list[str]:
    """The best layouts, the one asked for among or below them, and how to ask for the others."""
    listed = [*best, *([asked] if asked and not any(map(asked.is_laid_out_as, best)) else [])]
    rows, pasted = [], []
    for number, plan in enumerate(listed, start=1):
        engine, layout = plan.config.engine, plan.layout
        is_asked = asked is not None and plan.is_laid_out_as(asked)
        again = "on" if engine.activation_checkpointing else "off"
        degrees = [layout.data_parallel, layout.tensor_parallel, layout.pipeline_parallel, engine.zero_stage]
        row = [str(number), *map(str, degrees), again, str(layout.micro_steps), f"{plan.step_s:.3f}", f"{plan.mfu:.1%}"]
        rows.append([*row, f"{plan.memory_gib:.1f}", "asked for" if is_asked else ""])
        if not is_asked:
            words = [word for word in _overrides(plan, config) if not asked or word not in _overrides(asked, config)]
            pasted.append(f"{number}: {' '.join(words)}")
    head = ["", "data", "tensor", "pipeline", "ZeRO", "checkpointing", "accumulation", "s per step", "MFU", "GiB", ""]
    lines = ["best layouts of the same optimisation", *_table(head, rows)]
    return [*lines, "", "overrides that ask for them", *pasted] if pasted else lines


def _assumption_lines() -> list[str]:
    return [
        "Taken for granted, with sources in launch/hardware.py:",
        f"computing at {COMPUTE_EFFICIENCY:.0%} of the peak, links at {LINK_EFFICIENCY:.0%}, NCCL's own model of "
        f"latencies,",
        f"overlapped transfers hidden behind {OVERLAP:.0%} of the computing, {RESERVED_GIB} GiB of a GPU kept free,",
        f"{DECODED_PER_CORE_S} images decoded by a core in a second.",
        f"Of ZeRO's stages the lowest within {TIME_ERROR:.0%} of the fastest is listed.",
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
    costs: Costs,
    plan: Plan | None,
    reason: str | None,
    best: Sequence[Plan],
    compared: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """The plan for a machine. Units are in the names; the best layouts are overrides."""
    found: dict[str, Any] = {
        "possible": reason is None,
        "reason": reason,
        "parameters": costs.forward.parameters,
        "vocabulary": costs.vocabulary.size,
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
            "flops_per_sample": plan.costs.flops,
            "exchanges": [
                {name: getattr(each.transfer, name) for name in ("what", "kind", "axis")}
                | {"bytes": each.transfer.size}
                | {name: getattr(each, name) for name in ("link", "time_s", "exposed_s", "host_s")}
                for each in plan.exchanges
            ],
            **{name: getattr(plan, name) for name in ("compute_s", "bubble_s", "host_s", "step_s", "samples_per_s")},
            "mfu": plan.mfu,
            "hours": plan.hours,
            "gpu_hours": plan.hours * cluster.world,
            "decoding_cores_per_node": plan.decoding_cores,
        }
    found["best"] = [
        {"overrides": _overrides(each, config), "step_s": each.step_s, "memory_gib": each.memory_gib} for each in best
    ]
    if compared:
        found["compared"] = {name: {"predicted": p, "measured": m} for name, (p, m) in compared.items()}
    return found


def _overrides(plan: Plan, config: Config) -> list[str]:
    """A layout as overrides on a command line, of a run of this config."""
    engine = plan.config.engine
    return [
        # A degree that the config names has to give way; else it follows from the GPUs there are.
        *([f"engine.data_parallel={plan.layout.data_parallel}"] if config.engine.data_parallel else []),
        f"engine.tensor_parallel={engine.tensor_parallel}",
        f"engine.pipeline_parallel={engine.pipeline_parallel}",
        f"engine.zero_stage={engine.zero_stage}",
        f"engine.activation_checkpointing={str(engine.activation_checkpointing).lower()}",
        f"training.accumulation={plan.layout.micro_steps}",
    ]
