"""`python -m pretrain evaluate`: scores a checkpoint of a run on held-out pairs.

A process started by hand evaluates by itself; under torchrun, the ranks hold the model as the run's config lays it out,
so that a model that fits no single GPU is evaluated too.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.stream.heldout import HeldoutData
from pretrain.batch_spec import batch_spec, vocabulary_of
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run
from pretrain.config import Config, EngineConfig, parse_config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.figures import BATCH, all_scores, encode, zero_shot
from pretrain.parallel.build import build_engine
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh, is_launched, make_mesh, start_mesh, stop_mesh
from pretrain.run_folder import kept_tokenizers
from pretrain.scores import HELDOUT, Score, name_of, show, write
from pretrain.screen import say
from pretrain.zero_shot import prompts_beside


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
    prompts = prompts_beside(data.manifest.path)
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
    store = CheckpointStore(run_folder / "checkpoints", mesh.world)
    checkpoint = store.newest_valid(quarantine=False, step=step)
    if checkpoint is None:
        raise CheckpointError(f"No checkpoint in {store.folder}: give the output folder of a run that has saved one.")
    with still_there(checkpoint):
        run = read_run(checkpoint)
    config = parse_config(copy.deepcopy(run["config"]), str(checkpoint), overrides)
    if not is_launched():
        alone = alone.model_copy(update={"precision": config.engine.precision})
        return mesh, checkpoint, run, config.model_copy(update={"engine": alone})
    return make_mesh(mesh.world, mesh.device, config.engine), checkpoint, run, config


def tell(run_folder: Path, checkpoint: Path, run: dict, data: HeldoutData, scores: list[Score]) -> list[str]:
    """Prints the scores and writes them beside the run. Returns what went wrong with the latter."""
    name = name_of(data.manifest, run["config"]["data"]["heldout"])
    say(f"{run_folder}, step {run['step']}, {len(data)} pairs of {name}:")
    show(scores)
    path = run_folder / f"evaluation-{name}-step-{run['step']:09d}.json"
    try:
        write(path, scores, checkpoint=checkpoint, data=data)
        say(f"Written to {path}.")
    except DataError as error:
        return [f"{error} The figures above are complete."]
    return []


@contextlib.contextmanager
def still_there(checkpoint: Path) -> Iterator[None]:
    """A live run removes old checkpoints, also one that is being read."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} was removed while it was read, as a run does that goes on: evaluate again, or raise "
            f"checkpoint.keep."
        ) from None


def open_split(config: Config, mesh: Mesh, run_folder: Path, fingerprint: str) -> HeldoutData:
    """The pairs to evaluate on, with the tokenizer that the run was trained with, and all of them looked at."""
    heldout = config.data.heldout
    if heldout and not heldout.is_absolute() and not heldout.exists():
        raise DataError(
            f"There is no {heldout} in {Path.cwd()}: evaluate where the run was started, or say where the data is with "
            f"data.heldout=PATH or --split PATH."
        )
    path = find_tokenizer([*kept_tokenizers(run_folder), config.data.tokenizer], fingerprint)
    read = config.data.model_copy(update={"tokenizer": path})
    data = HeldoutData(batch_spec(config.model_copy(update={"data": read})))
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
    engine = build_engine(config, mesh, vocabulary=vocabulary_of(data.tokenizer), micro_batch_per_rank=BATCH)
    with still_there(checkpoint):
        CheckpointStore(checkpoint.parent, mesh.world).load(checkpoint, engine.fragments())
    engine.loaded(0)
    return engine
