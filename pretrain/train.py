"""Training from beginning to end. Reads as the table of contents of the toolkit."""

import signal
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import named
from data_pipelines.heldout import HeldoutData
from data_pipelines.loader import TrainingData
from pretrain.config import Config, load_config
from pretrain.parallel.build import build_engine
from pretrain.parallel.mesh import Mesh, start_mesh, stop_mesh
from pretrain.trainer import Trainer


def main(config_path: Path, overrides: Sequence[str]) -> None:
    """Trains what the config describes, on the processes that torchrun started."""
    config = load_config(config_path, overrides)
    mesh = start_mesh(config.engine)

    data, heldout = open_data(config, mesh)

    engine = build_engine(
        config,
        mesh,
        vocabulary=data.tokenizer.vocab_size,
        pad_id=data.tokenizer.pad_id,
        micro_batch_per_rank=data.micro_batch_per_rank,
    )

    trainer = Trainer(config, mesh, engine, data, heldout)
    stop_on_signal(trainer)
    trainer.resume()
    trainer.fit()

    stop_mesh()


def open_data(config: Config, mesh: Mesh) -> tuple[TrainingData, HeldoutData | None]:
    """The training shards as this rank reads them, and the held-out ones if there are any."""
    masked_lm = config.objectives.masked_lm
    common = {
        "image_size": config.model.image.size,
        "text_length": config.model.text.length,
        "mask_probability": masked_lm.probability if masked_lm else 0.15,  # masks are made, and not looked at
        "seed": config.seed,
    }
    data = TrainingData(
        config.data,
        global_batch=config.training.global_batch,
        accumulation=config.training.accumulation,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        **common,
    )
    with named("data.heldout"):
        return data, HeldoutData(config.data, **common) if config.data.heldout else None


def stop_on_signal(trainer: Trainer) -> None:
    """Ctrl-C, and SIGTERM, which a launcher and Slurm send, end the run after the current step, saved.

    One that was ignored when the run started, as a shell ignores Ctrl-C for its background jobs, stays ignored.
    """

    def request(number: int, frame: object) -> None:
        trainer.stop_requested = True

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request)
