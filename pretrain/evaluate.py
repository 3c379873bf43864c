"""`python -m pretrain evaluate`: scores a checkpoint of a run on held-out pairs.

A process started by hand evaluates by itself; under torchrun, the ranks hold the model as the run's config lays it out,
so that a model that fits no single GPU is evaluated too.
"""

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from data_pipelines.errors import DataError
from data_pipelines.heldout import HeldoutData
from data_pipelines.manifest import normalised, write_atomically
from data_pipelines.tokenizer import Tokenizer
from pretrain.checkpoint.store import CheckpointStore, read_run
from pretrain.config import Config, EngineConfig, parse_config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models.towers import Vocabulary
from pretrain.parallel.build import build_engine
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh, is_launched, make_mesh, start_mesh, stop_mesh
from pretrain.prompts import Prompts
from pretrain.run_folder import kept_tokenizers
from pretrain.scores import BATCH, Score, all_scores, encode, zero_shot
from pretrain.screen import say

HELDOUT = "heldout"  # the name of the split that the run's config names


def main(run_folder: Path, split: str, rerank: int, *, step: int | None = None, overrides: Sequence[str] = ()) -> None:
    """Evaluates a checkpoint of a run, the newest valid one by default: a table, and JSON beside the run.

    Raises:
        UserError: what is needed is not there. A figure that cannot be had, or the file, costs neither the others.
    """
    if rerank < 0:
        raise ConfigError(f"--rerank {rerank} is below 0: give a number of candidates, or 0 to rank nothing again.")
    mesh, checkpoint, run, config = open_run(run_folder, step, overrides)
    if split != HELDOUT:
        config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": Path(split)})})
    data = open_split(config, mesh, run_folder, run["tokenizer"])
    engine = load_engine(config, mesh, data, checkpoint)
    if mesh.is_main and (complaint := data.complaint()):
        say(complaint)
    prompts = Prompts.beside(data.manifest.path)
    encoded = encode(engine, mesh, data)
    scores, problems = all_scores(engine, mesh, data, encoded, rerank), []
    if prompts is not None and "text_embeddings" in encoded.tensors:
        try:
            scores.append(zero_shot(engine, mesh, data, encoded, prompts))
        except DataError as error:
            problems.append(str(error))
    if mesh.is_main:
        problems += tell(run_folder, checkpoint, run, data, scores)
    stop_mesh()
    if problems:
        raise DataError("\n".join(problems))


def open_run(run_folder: Path, step: int | None, overrides: Sequence[str]) -> tuple[Mesh, Path, dict, Config]:
    """The ranks, the checkpoint, what it says of its run, and the config to evaluate with.

    Raises:
        UserError: there is no such checkpoint, or its layout does not fit the processes.
    """
    alone = EngineConfig(zero_stage=0)
    mesh = start_mesh(alone)
    store = CheckpointStore(run_folder / "checkpoints", mesh.world, keep=2)
    checkpoint = store.newest_valid(quarantine=False, step=step)
    if checkpoint is None:
        raise CheckpointError(f"No checkpoint in {store.folder}: give the output folder of a run that has saved one.")
    with _still_there(checkpoint):
        run = read_run(checkpoint)
    config = parse_config(copy.deepcopy(run["config"]), str(checkpoint), overrides)
    if not is_launched():
        alone = alone.model_copy(update={"precision": config.engine.precision})
        return mesh, checkpoint, run, config.model_copy(update={"engine": alone})
    return make_mesh(mesh.world, mesh.device, config.engine), checkpoint, run, config


def tell(run_folder: Path, checkpoint: Path, run: dict, data: HeldoutData, scores: list[Score]) -> list[str]:
    """Prints the scores and writes them beside the run. Returns what went wrong with the latter."""
    name = name_of(data, run["config"]["data"]["heldout"])
    say(f"{run_folder}, step {run['step']}, {len(data)} pairs of {name}:")
    table = Table()
    for heading in ("", "score", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")
    for score in scores:
        table.add_row(score.name, f"{score.value:.3f}", f"{score.chance:.3f}")
    with contextlib.suppress(OSError):
        Console().print(table)
    path = run_folder / f"evaluation-{name}-step-{run['step']:09d}.json"
    try:
        write_atomically(path, lambda tmp: tmp.write_text(report(checkpoint, data, scores)))
        say(f"Written to {path}.")
    except DataError as error:
        return [f"{error} The figures above are complete."]
    return []


def report(checkpoint: Path, data: HeldoutData, scores: list[Score]) -> str:
    """The scores, and what they were measured on, as JSON."""
    figures = {
        score.name: {"value": score.value if math.isfinite(score.value) else None, "chance": score.chance}
        for score in scores
    }
    content = {
        "checkpoint": str(checkpoint),
        "manifest": str(data.manifest.path),
        "manifest_hash": data.manifest.hash,
        "samples": len(data),
        "bad_samples": len(data.bad),
        "scores": figures,
    }
    return json.dumps(content, indent=1, allow_nan=False)


def name_of(data: HeldoutData, heldout: str | None) -> str:
    """The name of a split in messages and files: no two manifests have the same."""
    if heldout is not None and data.manifest.path == normalised(Path(heldout)):
        return HELDOUT
    return f"{data.manifest.path.parent.name}-{data.manifest.hash[:8]}"


@contextlib.contextmanager
def _still_there(checkpoint: Path) -> Iterator[None]:
    """A live run removes old checkpoints, also one that is being read."""
    try:
        yield
    except (OSError, SafetensorError):
        if checkpoint.exists():
            raise
        raise CheckpointError(
            f"{checkpoint} was removed while it was read, as a run does that goes on: evaluate again, or raise "
            f"checkpoint.keep."
        ) from None


def open_split(config: Config, mesh: Mesh, run_folder: Path, fingerprint: str) -> HeldoutData:
    """The pairs to evaluate on, with the tokenizer that the run was trained with, and all of them looked at."""
    masked_lm = config.objectives.masked_lm
    path = find_tokenizer([*kept_tokenizers(run_folder), config.data.tokenizer], fingerprint)
    data = HeldoutData(
        config.data.model_copy(update={"tokenizer": path}),
        image_size=config.model.image.size,
        text_length=config.model.text.length,
        mask_probability=masked_lm.probability if masked_lm else 0.15,
        seed=config.seed,
    )
    data.examine(mesh.world.rank, mesh.world.size, mesh.world.gather_objects)
    return data


def find_tokenizer(paths: Sequence[Path], fingerprint: str) -> Path:
    """The first of some paths that holds the tokenizer a run was trained with."""
    for path in paths:
        with contextlib.suppress(DataError):
            if Tokenizer.load(path).fingerprint == fingerprint:
                return path
    raise DataError(
        f"The tokenizer that the run was trained with is not at {' or '.join(map(str, paths))}: put it back, or say "
        f"where it is with data.tokenizer=PATH. Another one would make other words of the same ids."
    )


def load_engine(config: Config, mesh: Mesh, data: HeldoutData, checkpoint: Path) -> Engine:
    """The model on its layout, with a checkpoint's weights."""
    vocabulary = Vocabulary(data.tokenizer.vocab_size, data.tokenizer.pad_id)
    engine = build_engine(config, mesh, vocabulary=vocabulary, micro_batch_per_rank=BATCH)
    with _still_there(checkpoint):
        CheckpointStore(checkpoint.parent, mesh.world, keep=2).load(checkpoint, engine.fragments())
    engine.loaded(0)
    return engine
