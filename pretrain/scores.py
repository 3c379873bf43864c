"""Scores of an evaluation: a table on the screen, and JSON beside the run."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipelines.shards.manifest import Manifest, normalised, write_atomically
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.text import to_json

HELDOUT = "heldout"  # the name of the split that the run's config names


@dataclass(frozen=True)
class Score:
    """One figure, and what guessing would score."""

    name: str
    value: float
    chance: float


def name_of(manifest: Manifest, heldout: str | None) -> str:
    """The name of a split in messages and files, the same for no two manifests. `heldout` is that of the run."""
    if heldout is not None and manifest.path == normalised(Path(heldout)):
        return HELDOUT
    identity = hashlib.sha256(f"{manifest.path}\n{manifest.hash}".encode(errors="surrogateescape")).hexdigest()
    return f"{manifest.path.parent.name}-{identity[:8]}"


def show(scores: list[Score]) -> None:
    """Prints a table."""
    table = Table()
    for heading in ("", "score", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")
    for score in scores:
        table.add_row(score.name, f"{score.value:.3f}", f"{score.chance:.3f}")
    with contextlib.suppress(OSError):
        Console().print(table)


def write(path: Path, scores: list[Score], *, checkpoint: Path, data: HeldoutData) -> None:
    """Writes the scores, and what they were measured on.

    Raises:
        DataError: the file cannot be written.
    """
    figures = {score.name: {"value": score.value, "chance": score.chance} for score in scores}
    content = {
        "checkpoint": str(checkpoint),
        "manifest": str(data.manifest.path),
        "manifest_hash": data.manifest.hash,
        "samples": len(data),
        "bad_samples": len(data.bad),
        "scores": figures,
    }
    text = to_json(content, indent=1)
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))
