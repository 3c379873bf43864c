"""Which checkpoints stay on disk."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCORES = "scores.json"
_PIN = "PINNED"


@dataclass(frozen=True)
class Keep:
    """What stays whatever comes after it: the newest, those of every n-th step, the best, and pinned ones."""

    newest: int = 3
    every: int | None = None  # steps
    best: str | None = None
    """Of what on held-out data: the lowest of a loss, the highest of all else."""

    def superfluous(self, steps: Sequence[int], scores: Mapping[int, float], pinned: Collection[int]) -> list[int]:
        """Those of the ascending steps that may go."""
        rated = [step for step in steps if step in scores]
        pick = min if self.best and self.best.startswith("loss") else max
        best = [pick(rated, key=scores.__getitem__)] if self.best and rated else []
        kept = {*steps[-self.newest :], *best, *pinned}
        return [step for step in steps if step not in kept and not (self.every and step % self.every == 0)]


def pin(checkpoint: Path) -> None:
    """Lets a checkpoint stay whatever comes after it."""
    (checkpoint / _PIN).touch()


def is_pinned(checkpoint: Path) -> bool:
    return (checkpoint / _PIN).exists()


def read_scores(folder: Path, metric: str | None) -> dict[int, float]:
    """By step, what a metric was on held-out data; nothing if that cannot be read, which costs the best its place."""
    try:
        found = json.loads((folder / SCORES).read_bytes())
        return {int(step): float(score) for step, score in found[metric].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def add_score(folder: Path, metric: str, step: int, score: float) -> None:
    """Notes what a metric was after a step.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    if math.isfinite(score):
        scores = {str(there): value for there, value in read_scores(folder, metric).items()} | {str(step): score}
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{SCORES}"
        temporary.write_text(json.dumps({metric: scores}, allow_nan=False))
        temporary.replace(folder / SCORES)
