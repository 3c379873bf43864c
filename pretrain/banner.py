"""What a run says of itself before its first step."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData
from data_pipelines.stream.workers import usable_workers
from data_pipelines.text import counted
from pretrain.config import Config
from pretrain.parallel.mesh import Mesh, training_dtype


def facts(config: Config, mesh: Mesh, data: TrainingData, parameters: int) -> dict[str, Any]:
    """What TensorBoard's text card shows beside the config."""
    return {
        "parameters": f"{parameters:,}",
        "ranks": mesh.world.size,
        "data x tensor x pipeline parallel": f"{mesh.dp.size} x {mesh.tp.size} x {mesh.pp.size}",
        "ZeRO stage": config.engine.zero_stage,
        "precision": str(training_dtype(config.engine, mesh.device)).removeprefix("torch."),
        "micro-batch per rank": data.micro_batch_per_rank,
        **{f"samples of {source.name}": source.manifest.samples for source in data.sources},
        "device": str(mesh.device),
    }


def banner(
    config: Config,
    mesh: Mesh,
    data: TrainingData,
    heldout: HeldoutData | None,
    parameters: int,
    step: int,
    origin: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """The lines that a run begins with: what is trained, on what, how long, and what may surprise."""
    about = facts(config, mesh, data, parameters)
    begin = f"resumed at step {step}" if step else "a fresh run"
    if origin:
        begin += f", begun with the weights of {origin['path']}"
    ranks = f"{counted(mesh.world.size, 'rank')} ({mesh.device.type}"
    layout = f"data x tensor x pipeline parallel {about['data x tensor x pipeline parallel']}"
    yield (
        f"{config.output}: {begin}. {parameters:,} parameters in {about['precision']} on {ranks}; {layout}, "
        f"ZeRO {config.engine.zero_stage})."
    )
    training = config.training
    shares = data.shares(step)
    sources = []
    for source, share in zip(data.sources, shares, strict=True):
        samples = source.order.grains_per_epoch * source.order.grain
        epochs = training.steps * training.global_batch * share / samples
        sources.append(f"{source.manifest.samples:,} of {source.name} ({epochs:.2f} epochs)")
        taken = training.global_batch * share
        if taken > samples:
            yield (
                f"A step takes {taken:,.0f} samples of {source.name}, which has {samples:,} in an epoch: steps repeat "
                f"samples. Lower training.global_batch ({training.global_batch:,}), or add data."
            )
    yield (
        f"{training.steps:,} steps of {training.global_batch:,} samples ({training.accumulation} x "
        f"{data.micro_batch_per_rank} per rank): {', '.join(sources)}."
    )
    if heldout:
        yield f"Held out: {counted(len(heldout), 'pair')}, evaluated every {training.evaluate_every:,} steps."
        if complaint := heldout.complaint():
            yield complaint
    wanted = config.data.workers
    if (workers := usable_workers(wanted)) < wanted:
        yield f"data.workers is {wanted}, and a rank may use {counted(workers, 'core')} here: {workers} will decode."
    if gpus := idle_gpus(os.environ):
        yield (
            f"This machine has {counted(gpus, 'NVIDIA GPU')} that torch {torch.__version__} cannot use: training on "
            f"the CPU. Install a CUDA build of torch that suits the driver, or hide them with CUDA_VISIBLE_DEVICES=."
        )


def idle_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs of this machine, if torch cannot use any although nobody hid them."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in environ:
        return 0
    return sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
