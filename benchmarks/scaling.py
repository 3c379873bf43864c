"""What ZeRO-3 holds and gathers on 1, 2 and 4 CPU ranks, and how throughput grows: `make bench-scaling`.

The figures of docs/measurements.md; tests/distributed/test_scaling.py holds the first two to their bounds.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from pretrain.config import Config, EngineConfig, parse_config
from pretrain.doctor import made_up_steps
from pretrain.models.towers import Vocabulary
from pretrain.parallel import zero
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import Mesh, start_mesh, stop_mesh
from pretrain.parallel.zero import ZeroEngine

RANKS = (1, 2, 4)
VOCABULARY = Vocabulary(61)
RATE = 1e-4
# Gathered weights are kept for reuse and fetched ahead up to distances counted in elements, 1e9 and 5e7, in which the
# whole of a test model lies: with these, every layer is gathered when it is needed, as in a model of many billions.
NO_LOOKAHEAD: dict[str, Any] = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def wide_config(accumulation: int = 1, **engine: object) -> Config:
    """6 M parameters in few and large matrices: what every rank keeps of small ones is below 2 %."""
    training = {"steps": 10, "global_batch": 8 * accumulation, "accumulation": accumulation}
    return _config({"width": 384, "depth": 1}, 32, 12, engine, training)


def deep_config(**engine: object) -> Config:
    """3 M parameters in many and small matrices, and batches that keep a core busy."""
    return _config({"width": 128, "depth": 4}, 64, 24, engine, {"steps": 10, "global_batch": 64})


def _config(
    tower: dict[str, int], size: int, length: int, engine: dict[str, object], training: dict[str, int]
) -> Config:
    tower = {**tower, "heads": 4}
    tree = {
        "output": "unused",
        "data": {"train": "unused", "tokenizer": "unused", "grain": 2},
        "model": {
            "image": {"size": size, "patch": 16, **tower},
            "text": {"length": length, **tower},
            "fusion": {"depth": tower["depth"], "heads": 4},
            "embed": 64,
        },
        "objectives": {"matching": {"pool": 2}},
        "engine": engine,
        "optimizer": {"warmup_steps": 1},
        "training": training,
    }
    return parse_config(tree, "scaling")


@contextmanager
def settings(*, gradients: str | None = None, **changes: Any) -> Iterator[None]:
    """DeepSpeed's settings with changes to its section on ZeRO, and with another type of gradients."""
    ours = zero.deepspeed_settings

    def changed(*arguments: Any) -> dict[str, Any]:
        tree = ours(*arguments)
        tree["zero_optimization"] |= changes
        return tree | ({"data_types": {"grad_accum_dtype": gradients}} if gradients else {})

    with mock.patch.object(zero, "deepspeed_settings", changed):
        yield


def build(mesh: Mesh, config: Config) -> Any:
    micro_batch = config.training.global_batch // config.training.accumulation // mesh.dp.size
    return build_engine(config, mesh, vocabulary=VOCABULARY, micro_batch_per_rank=micro_batch)


def step(engine: Any, mesh: Mesh, config: Config, number: int) -> Any:
    return engine.step(made_up_steps(number, config, VOCABULARY, mesh.dp, mesh.device), RATE)


def measure_state(mesh: Mesh, config: Config) -> dict[str, float]:
    """Bytes a parameter that all ranks hold together between two steps, by type, of everything the engine made."""
    before = _storages()
    engine = build(mesh, config)
    step(engine, mesh, config, 0)
    step(engine, mesh, config, 1)
    # Of a fixed size, whatever the model's: gradients on their way to other ranks.
    buckets = {bucket.buffer.data_ptr() for bucket in engine.optimizer.ipg_buckets.values()}
    parameters = sum(parameter.ds_numel for parameter in engine.model.parameters())
    held: Counter[str] = Counter()
    for pointer, (dtype, storage) in _storages().items():
        if pointer not in before and pointer not in buckets:
            held[str(dtype).removeprefix("torch.")] += storage.nbytes()
    return {kind: size * mesh.dp.size / parameters for kind, size in held.items()}


def _storages() -> dict[int, tuple[torch.dtype, Any]]:
    """The memory behind every live tensor, kept alive, so that no address is given out twice."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): (t.dtype, t.untyped_storage()) for t in tensors}


def count_gathers(mesh: Mesh, config: Config) -> tuple[dict[str, set[tuple[float, float]]], float]:
    """How often ZeRO-3 gathers in its third step, when it knows the order of layers.

    Returns:
        By layer, (in the forward pass, in the backward pass) a micro-step of each of its parameters that are not on
        every rank anyway; and how many elements travelled a micro-step, in units of all those parameters.
    """
    engine = build(mesh, config)
    assert isinstance(engine, ZeroEngine)
    for number in range(2):
        step(engine, mesh, config, number)
    calls: Counter[tuple[int, bool]] = Counter()
    elements = 0
    fetch = "_PartitionedParameterCoordinator__all_gather_params_"
    gather_ours, communicate = getattr(PartitionedParameterCoordinator, fetch), partition_parameters._dist_allgather_fn

    def counted(self: Any, parameters: Any, forward: bool, **options: Any) -> None:
        parameters = list(parameters)
        calls.update((p.ds_id, forward) for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        gather_ours(self, parameters, forward, **options)

    def communicated(part: torch.Tensor, whole: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal elements
        elements += whole.numel()
        return communicate(part, whole, *arguments, **options)

    with (
        mock.patch.object(PartitionedParameterCoordinator, fetch, counted),
        mock.patch.object(partition_parameters, "_dist_allgather_fn", communicated),
    ):
        step(engine, mesh, config, 2)
    micro_steps = config.training.accumulation
    by_layer: dict[str, set[tuple[float, float]]] = {}
    partitioned = 0
    parameter: Any
    for name, parameter in engine.model.named_parameters():
        times = calls[parameter.ds_id, True] / micro_steps, calls[parameter.ds_id, False] / micro_steps
        if parameter.ds_persist:
            assert times == (0, 0), name
        else:
            by_layer.setdefault(name.split(".")[0], set()).add(times)
            partitioned += parameter.ds_numel
    return by_layer, elements / micro_steps / partitioned


def measure_throughput(mesh: Mesh, config: Config, steps: int) -> tuple[float, float]:
    """Samples/s by the clock, and samples per second of all ranks' cores together, from median steps.

    The second does not see ranks wait, and is not disturbed by what else the machine does.
    """
    engine = build(mesh, config)
    clock, cores = [], []
    for number in range(2 + steps):  # the first two warm up
        start, start_cores = time.perf_counter(), time.process_time()
        step(engine, mesh, config, number)
        clock.append(time.perf_counter() - start)
        cores.append(time.process_time() - start_cores)
    core_s = sum(mesh.world.gather_objects(statistics.median(cores[2:])))
    batch = config.training.global_batch
    return batch / statistics.median(clock[2:]), batch / core_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures ZeRO-3's state, its gathers, and throughput on CPU ranks.")
    parser.add_argument("--steps", type=int, default=10, help="for each figure of throughput (default 10)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # one of the processes to measure
    options = parser.parse_args()
    if options.rank:
        measure_as_rank(options.steps)
        return
    headings = ("ranks", "bytes per parameter, all ranks together", "gathers per micro-step")
    print(f"| {' | '.join(headings)} | ZeRO-0, samples/s, and a core-second | ZeRO-3 |")
    print("|---|---|---|---|---|")
    for ranks in RANKS:
        command = [sys.executable, "-m", "launch.torchrun", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
        command += ["-m", "benchmarks.scaling", "--rank", "--steps", str(options.steps)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        figures = json.loads(out.splitlines()[-1])
        state = " + ".join(f"{size:.2f} in {kind}" for kind, size in figures["state"].items() if size > 0.005)
        gathers = f"{figures['gathers']:.2f} x the model"
        rates = " | ".join("{:.0f}, {:.0f}".format(*figures[stage]) for stage in ("zero_0", "zero_3"))
        print(f"| {ranks} | {state} | {gathers} | {rates} |", flush=True)


def measure_as_rank(steps: int) -> None:
    """All figures of this number of ranks, as a line of JSON from the main one."""
    mesh = start_mesh(EngineConfig())
    figures: dict[str, Any] = {"state": measure_state(mesh, wide_config(precision="bf16"))}
    with settings(**NO_LOOKAHEAD):
        figures["gathers"] = count_gathers(mesh, wide_config(precision="fp32"))[1]
    for stage in (0, 3):
        figures[f"zero_{stage}"] = measure_throughput(mesh, deep_config(zero_stage=stage, precision="fp32"), steps)
    if mesh.is_main:
        print(json.dumps(figures), flush=True)
    stop_mesh()


if __name__ == "__main__":
    main()
