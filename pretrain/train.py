"""Training from beginning to end. Reads as the table of contents of the toolkit."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipelines.errors import UserError, named
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData
from pretrain.batch_spec import batch_spec, vocabulary_of
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import Config, load_config
from pretrain.errors import ConfigError
from pretrain.lease import Lease, take
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import Mesh, start_mesh, stop_mesh
from pretrain.stopping import Stop
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
    with stop.interrupting():
        mesh = start_mesh(config.engine)
        lease = claim_folder(config, mesh)
    try:
        run(config, mesh, lease, stop)
    finally:
        if lease:
            lease.release()
    stop_mesh()


def run(config: Config, mesh: Mesh, lease: Lease | None, stop: Stop) -> None:
    """The run, in a folder that this job owns; `lease` is the main process's."""
    with stop.interrupting():
        data, heldout = open_data(config, mesh)

        engine = build_engine(
            config,
            mesh,
            vocabulary=vocabulary_of(data.tokenizer),
            micro_batch_per_rank=data.micro_batch_per_rank,
        )

        trainer = Trainer(config, mesh, engine, data, heldout, stop, lease)
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


def open_data(config: Config, mesh: Mesh) -> tuple[TrainingData, HeldoutData | None]:
    """What the model reads of the training shards on this rank, and of the held-out ones, looked at once, if any.

    Raises:
        UserError: what is there cannot be used, or does not divide over the processes.
    """
    if mesh.world.from_first(CheckpointStore(config.output / "checkpoints", mesh.world).has_begun()):
        check_ranks(config, mesh)
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


def check_ranks(config: Config, mesh: Mesh) -> None:
    """Refuses a number of processes that would need another batch or grain than a run has begun with."""
    training, grain = config.training, config.data.grain
    grains, rest = divmod(training.global_batch, training.accumulation * grain)
    if rest or grains % mesh.dp.size == 0:
        return
    per_replica = mesh.world.size // mesh.dp.size
    *some, last = [str(ranks * per_replica) for ranks in range(1, grains + 1) if grains % ranks == 0]
    raise ConfigError(
        f"The run in {config.output} has begun, and a step of it ({training.global_batch:,} samples / "
        f"training.accumulation {training.accumulation} = {grains} grains of {grain}) does not divide over "
        f"{mesh.world.size} processes: use {', '.join(some)}{' or ' if some else ''}{last} processes."
    )
