"""Training from beginning to end. Reads as the table of contents of the toolkit."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipelines.errors import UserError, named
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData
from pretrain.batch_spec import batch_spec, vocabulary_of
from pretrain.config import Config, load_config
from pretrain.elastic import adapt
from pretrain.heartbeat import Heart
from pretrain.lease import Lease, take
from pretrain.orders import Orders
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import TIMEOUT, Mesh, start_mesh, stop_mesh
from pretrain.stopping import Stop
from pretrain.time_limit import time_limit
from pretrain.trainer import Trainer


def main(config_path: Path, overrides: Sequence[str], stop: Stop) -> None:
    """Trains what the config describes, on the processes that torchrun started.

    Raises:
        Interrupted: told to stop before there was anything to save.
        UserError: whatever else ends a run.
    """
    config = load_config(config_path, overrides)
    if config.training.deterministic:
        take_deterministic_kernels()
    heart = Heart(config.output, config.training.hang_timeout_s, 0.9 * TIMEOUT.total_seconds(), config.data.patience_s)
    heart.beat("start", 0)
    with stop.interrupting():
        mesh = start_mesh(config.engine)
        lease = claim_folder(config, mesh)
    try:
        run(config, mesh, lease, stop, heart)
    finally:
        if lease:
            lease.release()
    stop_mesh()


def run(config: Config, mesh: Mesh, lease: Lease | None, stop: Stop, heart: Heart) -> None:
    """The run, in a folder that this job owns; `lease` is the main process's."""
    with stop.interrupting():
        config, elastic = adapt(config, mesh)
        data, heldout = open_data(config, mesh)

        engine = build_engine(
            config,
            mesh,
            vocabulary=vocabulary_of(data.tokenizer),
            micro_batch_per_rank=data.micro_batch_per_rank,
        )

        orders = open_orders(config, mesh, stop)
        trainer = Trainer(config, mesh, engine, data, heldout, orders, heart, lease, elastic)
        trainer.resume()

    trainer.fit()


def take_deterministic_kernels() -> None:
    """To be called before the first kernel runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS, by CUDA's documentation
    torch.use_deterministic_algorithms(True)
    # Filled with NaN by default, which from DeepSpeed's padding would reach the gradient norm.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def claim_folder(config: Config, mesh: Mesh) -> Lease | None:
    """Takes the run's folder, on the main process; on all of them, refuses a folder that another job uses."""
    lease = problem = None
    if mesh.is_main:
        try:
            lease = take(config.output)
        except UserError as error:
            problem = error
    if problem := mesh.world.from_first(problem):
        raise problem
    return lease


def open_orders(config: Config, mesh: Mesh, stop: Stop) -> Orders:
    """What the run may be told from outside; files and the clock are the main process's."""
    if not mesh.is_main:
        return Orders(stop)
    return Orders(stop, config.output, time_limit(config.training.time_limit_minutes, os.environ))


def open_data(config: Config, mesh: Mesh) -> tuple[TrainingData, HeldoutData | None]:
    """What the model reads of the training shards on this rank, and of the held-out ones, looked at once, if any.

    Raises:
        UserError: what is there cannot be used, or does not divide over the processes.
    """
    spec = batch_spec(config)
    data = TrainingData(
        spec,
        global_batch=config.training.global_batch,
        accumulation=config.training.accumulation,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
    )
    if config.data.heldout is None:
        return data, None
    with named("data.heldout"):
        heldout = HeldoutData(spec)
    heldout.examine(mesh.world.rank, mesh.world.size, mesh.world.gather_objects)
    return data, heldout
