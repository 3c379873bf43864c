"""Training from beginning to end. Reads as the table of contents of the toolkit."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_pipelines.errors import UserError, named
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData
from pretrain.batch_spec import batch_spec, vocabulary_of
from pretrain.config import Config, load_config
from pretrain.elastic import adapt
from pretrain.heartbeat import Heart
from pretrain.orders import Orders
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import TIMEOUT, Mesh, start_mesh, stop_mesh
from pretrain.run_folder import claim
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
    most_s = 0.9 * TIMEOUT.total_seconds()
    heart = Heart(config.output, config.training.hang_timeout_s, most_s, config.data.patience_s)
    heart.beat("start", 0)
    with stop.interrupting():
        mesh = start_mesh(config.engine)
        lock = claim_folder(config, mesh)
        config, elastic = adapt(config, mesh)

        data, heldout = open_data(config, mesh)

        engine = build_engine(
            config,
            mesh,
            vocabulary=vocabulary_of(data.tokenizer),
            micro_batch_per_rank=data.micro_batch_per_rank,
        )

        trainer = Trainer(config, mesh, engine, data, heldout, open_orders(config, mesh, stop), heart, elastic)
        trainer.resume()

    trainer.fit()

    stop_mesh()
    if lock:
        lock.close()


def claim_folder(config: Config, mesh: Mesh) -> TextIO | None:
    """Locks the run's folder, on the main process; on all of them, refuses a folder that another job uses."""
    lock = problem = None
    if mesh.is_main:
        try:
            lock = claim(config.output)
        except UserError as error:
            problem = error
    if problem := mesh.world.from_first(problem):
        raise problem
    return lock


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
