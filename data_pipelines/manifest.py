"""The manifest: which shards there are, how many samples each holds, and what identifies them.

It is made once and never changes, and the order of the data follows from its counts alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipelines.errors import DataError, cannot_open

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A tar and what a scan of its headers found."""

    path: Path
    samples: int  # usable ones: with an image and a caption
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """An immutable, ordered list of shards."""

    shards: tuple[Shard, ...]
    folder: Path  # the manifest's own; shards below it are stored relative to it

    @cached_property
    def hash(self) -> str:
        """Identifies the data: it survives moving manifest and shards together, and nothing else."""
        return hashlib.sha256(json.dumps(self._rows()).encode()).hexdigest()

    @property
    def samples(self) -> int:
        """Usable samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest and checks that its shards are there.

        Raises:
            DataError: No such file, it cannot be opened, is not a manifest, or a shard is missing or of another size.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"There is no manifest at {path}: write one with `python -m data_pipelines index SHARDS -o {path}`."
            ) from None
        except OSError as error:
            raise cannot_open(f"Manifest {path}", error) from None
        try:
            content = json.loads(raw.decode("utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads format {FORMAT}")
            rows = [(str(row["path"]), int(row["samples"]), int(row["bytes"])) for row in content["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a manifest of shards ({type(error).__name__}: {error}): "
                f"write it again with `python -m data_pipelines index`."
            ) from None
        folder = normalised(path).parent
        manifest = cls(tuple(Shard(folder / name, samples, size) for name, samples, size in rows), folder)
        for shard in manifest.shards:
            check_size(shard)
        return manifest

    def save(self, path: Path) -> None:
        """Writes the manifest so that it is there whole or not at all."""
        if normalised(path).parent != self.folder:
            raise ValueError(f"this manifest belongs into {self.folder}")
        rows = [{"path": name, "samples": samples, "bytes": size} for name, samples, size in self._rows()]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = f'{{"format": {FORMAT}, "shards": [\n{lines}\n]}}\n'
        write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))

    def _rows(self) -> list[tuple[str, int, int]]:
        return [(_relative(shard.path, self.folder), shard.samples, shard.bytes) for shard in self.shards]


def check_size(shard: Shard) -> None:
    """Raises DataError where the shard is missing or has changed size since it was indexed."""
    try:
        found = shard.path.stat().st_size
    except OSError:
        raise DataError(
            f"Shard {shard.path} is in the manifest but cannot be found: put it back, "
            f"or write the manifest again with `python -m data_pipelines index`."
        ) from None
    if found != shard.bytes:
        raise DataError(
            f"Shard {shard.path} has {found:,} bytes but had {shard.bytes:,} when it was indexed: restore it, "
            f"or write the manifest again with `python -m data_pipelines index`."
        )


def _relative(path: Path, folder: Path) -> str:
    absolute = normalised(path)
    return (absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute).as_posix()


def normalised(path: Path) -> Path:
    """Absolute and without `..`, but with symbolic links as they are: shards are often links into a store."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a temporary file and renames it to `path`: the file is there whole or not at all."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        tmp.replace(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise DataError(
            f"Cannot write {path}: {error.strerror}. Free some space or get the right to write there."
        ) from None
