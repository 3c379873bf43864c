"""Whether a checkpoint is what was written, and makes sense, before anything of it is used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint import manifest
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.writer import in_words
from pretrain.errors import CheckpointError
from pretrain.parallel.mesh import Axis


def verify(checkpoint: Path, world: Axis) -> str | None:
    """Why a checkpoint is not whole, or None. Each rank hashes its share of the pieces; all call it together."""
    files, problem = world.from_first(manifest.read(checkpoint) if world.rank == 0 else None)
    if problem is not None:
        return problem
    sizes = manifest.sizes(files)
    share = list(manifest.pieces_of(files))[world.rank :: world.size]
    problems = [why for piece in share if (why := manifest.check_piece(checkpoint, piece, sizes[piece.file]))]
    if world.rank == 0 and not problems and (why := _misfit(checkpoint, sizes)):
        problems = [why]
    return next((why for found in world.gather_objects(problems) for why in found), None)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `run`, and the step."""
    return json.loads((checkpoint / manifest.RUN).read_bytes())


def _misfit(checkpoint: Path, sizes: Mapping[str, int]) -> str | None:
    """Why what the files say of each other cannot be, whatever their hashes are."""
    try:
        if problem := Index.open(checkpoint).misfit(sizes):
            return problem
        run = read_run(checkpoint)
    except OSError as error:
        return in_words(error)
    except CheckpointError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"{manifest.RUN} is not JSON: {error}"
    if step_of(run) is None:
        return f"{manifest.RUN} does not say of which step it is"
    return None


def step_of(run: Any) -> int | None:
    """The step that a run.json is of, if it says one."""
    step = run.get("step") if isinstance(run, dict) else None
    return step if type(step) is int and step >= 0 else None
