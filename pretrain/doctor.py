"""`python -m pretrain doctor`: does this layout take the steps of one process here, and how fast are the ranks?

Needs no data: a shrunken copy of the config trains for a few steps on made-up samples, once as the config lays it out
and once in plain PyTorch in one process. Then links and processors are measured.
"""

import math
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretrain.collectives import Group, ring_shift
from pretrain.config import Config, EngineConfig, load_config, parse_config
from pretrain.errors import LayoutError
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Flow
from pretrain.models.towers import Vocabulary
from pretrain.parallel.build import build_engine
from pretrain.parallel.copies import Difference, differing_copies
from pretrain.parallel.mesh import ALONE, Axis, Mesh, start_mesh, stop_mesh, training_dtype
from pretrain.synthetic import made_up_batch

STEPS = 3  # the first compares gradients; later ones also what was done with them
RATE = 1e-4  # without warmup: an update moves a loss of the copy by a few tenths
# Relative differences of losses, and of gradient norms. In fp32 sums are only taken in another order, and sound layouts
# differ by about 1e-6. In bf16 a number has 8 bits: losses differ by up to 2 % (sigmoid 6 %), norms by 1.5 % (9 %).
TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (0.15, 0.2)}
NORM = "gradient norm"
SIZES_MIB = (1, 8, 64)
REPETITIONS = 5
SLOW = 0.8  # of the median

Curve = list[dict[str, float]]  # one a step: the losses by objective, and the gradient norm


def main(config_path: Path, overrides: Sequence[str]) -> None:
    """Examines the configured layout on the processes that torchrun started, or on this one.

    Raises:
        ConfigError: the config is wrong, or its degrees do not fit the processes.
        LayoutError: losses or gradient norms differ from those of one process, or copies from one another.
        TrainingError: a trainable parameter has no gradient.
    """
    config = load_config(config_path, overrides)
    mesh = start_mesh(config.engine)
    hosts = mesh.world.gather_objects(socket.gethostname())
    dtype = training_dtype(config.engine, mesh.device)

    def say(what: str | Table) -> None:
        if mesh.is_main:  # rich would break lines of text where a log file has none
            print(what, flush=True) if isinstance(what, str) else Console().print(what)

    say(_describe(config, mesh, hosts))
    comparisons = compare(config, mesh)
    say(_comparison_table(comparisons))
    if mesh.world.size > 1:
        say(_bandwidth_table(mesh.world.gather_objects(measure_bandwidth(mesh, dtype))))
    say(describe_speeds(mesh.world.gather_objects(measure_products(mesh.device, dtype)), hosts, dtype))
    stop_mesh()

    problems = [problem for comparison in comparisons if (problem := comparison.problem(hosts))]
    if problems:
        raise LayoutError("\n".join(problems))
    say("The layout takes the steps of one process.")


@dataclass(frozen=True)
class Comparison:
    """Curves of all ranks beside that of one process."""

    name: str
    precision: str
    reference: Curve
    curves: Sequence[Curve]  # in the order of ranks
    differing: Sequence[Difference] = ()  # what several ranks hold, and do not hold alike

    def differences(self) -> Iterator[tuple[float, int, int, str]]:
        """(relative difference, rank, step, quantity) of everything that was compared; not finite where that is."""
        for rank, curve in enumerate(self.curves):
            for step, (values, expected) in enumerate(zip(curve, self.reference, strict=True)):
                for name, value in values.items():
                    difference = abs(value - expected[name]) / max(abs(expected[name]), 1e-6)
                    yield difference if math.isfinite(difference) else math.inf, rank, step, name

    def allowed(self, name: str) -> float:
        """The largest difference of a quantity that is no problem."""
        losses, norms = TOLERANCES[self.precision]
        return norms if name == NORM else losses

    def largest(self) -> dict[str, float]:
        """The largest difference of each quantity."""
        return {name: max(d for d, _, _, n in self.differences() if n == name) for name in self.reference[0]}

    def problem(self, hosts: Sequence[str]) -> str | None:
        """The first difference that is too large, as a sentence."""
        excess = [found for found in self.differences() if found[0] > self.allowed(found[3])]
        if not excess and self.differing:
            others = f", and {more} more" if (more := len(self.differing) - 1) else ""
            return (
                f"{self.name}: {self.differing[0]} after {STEPS} steps{others}, where copies have to be the same to "
                f"the last bit: {' and '.join(hosts[rank] for rank in self.differing[0].ranks)} get unequal results of "
                f"one collective, or of one computation; run the doctor on one host at a time to find which is wrong."
            )
        if not excess:
            return None
        difference, rank, step, name = min(excess, key=lambda found: (found[2], -found[0]))
        return (
            f"{self.name}: {name} of step {step + 1} is {self.curves[rank][step][name]:.6g} on rank {rank} of "
            f"{hosts[rank]} and {self.reference[step][name]:.6g} in one process; they differ by {difference:.1e}, and "
            f"{self.allowed(name):g} is allowed: run the doctor on fewer hosts, then with engine.zero_stage=0, then "
            f"with tensor_parallel and pipeline_parallel 1, until they agree, to find the part that is wrong."
        )


def compare(config: Config, mesh: Mesh) -> list[Comparison]:
    """Trains the shrunken copy on the layout and in one process. All ranks call it together, and all get the same.

    The layout runs in fp32 whatever the config says, and in bf16 too if the config trains in it.
    """
    torch.set_float32_matmul_precision("highest")  # some containers start with TF32, which has 10 bits
    copy = shrink(config, mesh.dp.size)
    everyone = mesh.world.gather_objects
    alone = everyone(curve_alone(copy, mesh.device))
    comparisons = []
    if mesh.world.size > 1:  # a rank that errs by itself
        comparisons.append(Comparison("rank alone", "fp32", alone[0], alone))
    in_bf16 = training_dtype(config.engine, mesh.device) == torch.bfloat16
    for precision in ("fp32", "bf16") if in_bf16 else ("fp32",):
        curve, differing = curve_of_layout(_with(copy, "engine", precision=precision), mesh)
        comparisons.append(Comparison(precision, precision, alone[0], everyone(curve), differing))
    return comparisons


def shrink(config: Config, dp_size: int) -> Config:
    """The config with a small model and small batches: every kind of layer, and as many as there are stages.

    The engine, the objectives and the optimizer stay as they are. A pool of hard negatives lies on one rank, or on as
    many as before. Beyond 16 ranks, each takes as few samples as that allows, since one process has to take them all.
    """
    tree, model, engine = config.model_dump(mode="json"), config.model, config.engine
    heads = max(2, engine.tensor_parallel)
    # ZeRO-3 keeps parameters of up to 1e5 elements on every rank: an MLP's matrix, 4 width^2 over tensor_parallel
    # ranks, is just above that, and is partitioned and gathered as in the whole model.
    width = heads * (math.isqrt(25_000 * engine.tensor_parallel) // heads + 1)
    for name, tower in model.towers.items():
        tree["model"][name] |= {"depth": min(tower.depth, max(2, engine.pipeline_parallel)), "heads": heads}
    tree["model"]["image"] |= {"size": 16, "patch": 8, "width": width}
    tree["model"]["text"] |= {"length": min(model.text.length, 6), "width": width}
    tree["model"]["embed"] = model.embed and min(model.embed, 32)

    matching, many = config.objectives.matching, dp_size > 16
    grain, grains_in_pool = min(config.data.grain, 2 if many else 4), 1
    if matching and matching.pool > config.data.grain:
        grain = 1 if many else grain
        grains_in_pool = min(matching.pool // config.data.grain, max(2, dp_size))
    if matching:
        grain = min(matching.pool, grain)
        tree["objectives"]["matching"]["pool"] = grain * grains_in_pool
    tree["data"]["grain"] = grain
    # One micro-step more than stages: each then goes back and forth in turn for a while.
    accumulation = min(config.training.accumulation, engine.pipeline_parallel + 1)
    grains = math.lcm(dp_size, grains_in_pool) * (1 if many else 2)
    batch = accumulation * grain * grains
    tree["training"] |= {"accumulation": accumulation, "global_batch": batch, "debug": True}
    return parse_config(tree, source="the doctor's copy")


def made_up_steps(step: int, config: Config, vocabulary: Vocabulary, dp: Axis, device: torch.device) -> list[Flow]:
    """Made-up samples of one step as a rank of the axis reads them, one batch per micro-step."""
    accumulation, grain = config.training.accumulation, config.data.grain
    samples = config.training.global_batch
    grains = torch.arange(step * samples, (step + 1) * samples, device=device).view(accumulation, -1, grain)
    return [made_up_batch(config, vocabulary, part[dp.rank :: dp.size].flatten()) for part in grains]


def curve_alone(config: Config, device: torch.device) -> Curve:
    """The steps of one process: one model, fp32, plain PyTorch.

    It takes every rank's samples. With tensor_parallel 1 one takes about 1.2 MB, and 5 ms of a processor core per step:
    for 2,048 ranks of two samples that is 5 GB and a minute and a half on one core.
    """
    contrastive = config.objectives.contrastive
    if contrastive and contrastive.negatives == "global_batch":
        config = _with(config, "training", accumulation=1)  # which is what it means
    vocabulary = _vocabulary(config)
    alone = EngineConfig(zero_stage=0, precision="fp32")
    return _curve(config.model_copy(update={"engine": alone}), vocabulary, Mesh(device))[0]


def curve_of_layout(config: Config, mesh: Mesh) -> tuple[Curve, list[Difference]]:
    """The steps on the configured engine, and copies that differ after them. All ranks call it together."""
    return _curve(config, _vocabulary(config), mesh)


def _curve(config: Config, vocabulary: Vocabulary, mesh: Mesh) -> tuple[Curve, list[Difference]]:
    micro_batch = config.training.global_batch // config.training.accumulation // mesh.dp.size
    engine = build_engine(config, mesh, vocabulary=vocabulary, micro_batch_per_rank=micro_batch)
    results = [
        engine.step(made_up_steps(step, config, vocabulary, mesh.dp, mesh.device), RATE) for step in range(STEPS)
    ]
    curve = [result.losses | {NORM: result.gradient_norm} for result in results]
    return curve, differing_copies(engine.fragments(), mesh.world)


def measure_bandwidth(mesh: Mesh, dtype: torch.dtype) -> dict[str, list[float]]:
    """This rank's GB/s (bytes of the result over the median time) of each operation on each axis, by SIZES_MIB.

    All ranks call it together, so that the groups of an axis share links as in training.
    """
    axes = {"dp": mesh.dp, "tp": mesh.tp, "pp": mesh.pp}
    if mesh.world.size not in (axis.size for axis in axes.values()):
        axes["world"] = mesh.world
    rates: dict[str, list[float]] = {}
    for name, axis in axes.items():
        for size in SIZES_MIB if axis.size > 1 else ():
            part = torch.zeros((size << 20) // dtype.itemsize // axis.size, dtype=dtype, device=mesh.device)
            whole = part.repeat(axis.size)
            for what, operate in _operations(part, whole, axis.group).items():
                seconds = [_seconds(operate, mesh.device, axis) for _ in range(1 + REPETITIONS)]  # the first warms up
                rate = whole.nbytes / statistics.median(seconds[1:]) / 1e9
                rates.setdefault(f"{name}, {axis.size} ranks: {what}", []).append(rate)
    return rates


def measure_products(device: torch.device, dtype: torch.dtype) -> float:
    """This rank's FLOP/s in products of square matrices, the median of half a second of them."""
    side = 8192 if device.type == "cuda" else 512
    factors = torch.randn(2, side, side, device=device).to(dtype)
    seconds: list[float] = []
    while sum(seconds) < 0.5 or len(seconds) < REPETITIONS:
        seconds.append(_seconds(lambda: factors[0] @ factors[1], device))
    return 2 * side**3 / statistics.median(seconds)


def describe_speeds(speeds: Sequence[float], hosts: Sequence[str], dtype: torch.dtype) -> str:
    """Says how fast the ranks multiply, and names those that are slow: every step waits for the slowest."""
    middle = statistics.median(speeds)
    unit, scale = ("TFLOP/s", 1e12) if middle >= 1e12 else ("GFLOP/s", 1e9)
    kind = str(dtype).removeprefix("torch.")
    lines = [
        f"Matrix products in {kind}, {unit} a rank: median {middle / scale:.3g}, slowest {min(speeds) / scale:.3g}, "
        f"fastest {max(speeds) / scale:.3g}."
    ]
    for rank, speed in enumerate(speeds):
        if speed < SLOW * middle:
            lines.append(
                f"Slow: rank {rank} on {hosts[rank]} makes {speed / scale:.3g} {unit}, {speed / middle:.0%} of the "
                f"median {middle / scale:.3g}."
            )
    return "\n".join(lines)


def _with(config: Config, section: str, **changes: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _vocabulary(config: Config) -> Vocabulary:
    """Not a multiple of tensor_parallel: the last rank's share is smaller, as with most tokenizers."""
    return Vocabulary(64 * config.engine.tensor_parallel - 3)


def _operations(part: Tensor, whole: Tensor, group: Group) -> dict[str, Callable[[], object]]:
    return {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "to the next rank": lambda: ring_shift(whole, group),
    }


def _seconds(operate: Callable[[], object], device: torch.device, axis: Axis = ALONE) -> float:
    axis.sum(torch.zeros(1, device=device))  # nobody is ahead
    _wait(device)
    start = time.perf_counter()
    operate()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(config: Config, mesh: Mesh, hosts: Sequence[str]) -> str:
    copy = shrink(config, mesh.dp.size)
    layers = architecture_of(copy, _vocabulary(copy)).layers
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU"
    return (
        f"Ranks: {mesh.world.size}, hosts: {len(set(hosts))}, device: {device}, data x tensor x pipeline parallel: "
        f"{mesh.dp.size} x {mesh.tp.size} x {mesh.pp.size}, ZeRO stage: {config.engine.zero_stage}.\n"
        f"A copy of {len(layers)} layers of width {copy.model.text.width} takes {STEPS} steps of "
        f"{copy.training.global_batch} made-up samples in {copy.training.accumulation} micro-steps."
    )


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    title = "Relative difference from one process, the largest of all ranks and steps"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    quantities = list(comparisons[0].reference[0])
    losses = [name for name in quantities if name != NORM]
    for heading in ("", *losses, "norm", "allowed", "of norm"):  # as short as 80 columns ask for
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for comparison in comparisons:
        largest = comparison.largest()
        figures = (f"{largest[name]:.1e}" for name in quantities)
        table.add_row(comparison.name, *figures, *(f"{limit:g}" for limit in TOLERANCES[comparison.precision]))
    return table


def _bandwidth_table(rates: Sequence[dict[str, list[float]]]) -> Table:
    table = Table(title="GB/s of the slowest rank", box=box.SIMPLE_HEAD)
    for heading in ("", *(f"{size} MiB" for size in SIZES_MIB), "slowest"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in rates[0]:
        figures = [min(rank[name][size] for rank in rates) for size in range(len(SIZES_MIB))]
        slowest = min(range(len(rates)), key=lambda rank: rates[rank][name][-1])
        table.add_row(name, *(f"{figure:.3g}" for figure in figures), f"rank {slowest}")
    return table
