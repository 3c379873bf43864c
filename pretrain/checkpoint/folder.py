"""What lies in a folder of checkpoints, and under which names."""

import re
import uuid
from pathlib import Path

from pretrain.checkpoint import manifest
from pretrain.checkpoint.retention import SCORES
from pretrain.checkpoint.verify import read_run, step_of

QUARANTINE, LATEST = "quarantine", "LATEST"
_CHECKPOINT = re.compile(r"step-(\d{9,})")
_TEMPORARY = re.compile(r"\.tmp-step-\d{9,}-[0-9a-f]+")


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def temporary_name(step: int) -> str:
    """One that is given once: for what is not a checkpoint yet, or no longer."""
    return f".tmp-{name_of(step)}-{uuid.uuid4().hex[:8]}"


def contents(folder: Path) -> tuple[list[int], list[str]]:
    """The steps of the committed checkpoints, ascending, and the names of whatever else lies there."""
    steps, others = [], []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and name_of(int(match[1])) == entry.name and entry.is_dir() and not _is_of_another_step(entry):
            steps.append(int(match[1]))
        elif entry.name not in {QUARANTINE, LATEST, SCORES} and not entry.name.startswith("."):
            others.append(entry.name)
    return sorted(steps), others


def leftovers(folder: Path) -> list[Path]:
    """What was being written or removed when a run ended."""
    return [entry for entry in folder.iterdir() if _TEMPORARY.fullmatch(entry.name)] if folder.is_dir() else []


def _is_of_another_step(checkpoint: Path) -> bool:
    """Whether its run.json is whole and says another step than its name: someone's copy. Damage is no such thing."""
    try:
        files, problem = manifest.read(checkpoint)
        (piece,) = [piece for piece in manifest.pieces_of(files) if piece.file == manifest.RUN]
        if problem or manifest.check_piece(checkpoint, piece, piece.bytes):
            return False
        step = step_of(read_run(checkpoint))
    except (OSError, ValueError, RecursionError):
        return False
    return step is not None and name_of(step) != checkpoint.name
