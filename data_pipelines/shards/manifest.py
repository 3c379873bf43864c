"""The manifest: which shards there are, how many samples each holds, which of them are kept, what identifies them.

It is made once and never changes, and the order of the data follows from its counts alone. With it come

    manifest.json        one line per shard; paths below its folder are relative, so the whole can be moved
    manifest.keep.npy    one bit per sample, where filters or faults keep some from being read
    manifest.index/      the byte ranges of each shard's samples; what is missing is made anew when it is needed
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np

from data_pipelines.errors import DataError, cannot_open, cannot_write
from data_pipelines.storage.addresses import file_name, is_remote
from data_pipelines.storage.wording import AGAIN, INDEX_AGAIN

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar and what is known of it."""

    location: str  # absolute path, or URL
    samples: int  # that a run may read
    bytes: int
    indexed: int  # all samples, those that are not kept included
    version: str = ""  # of a remote: its ETag or time of change
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """An immutable, ordered list of shards."""

    path: Path  # its own
    shards: tuple[Shard, ...]
    counts: Literal["headers", "stats"] = "headers"  # who counted: a scan of the tars, or who made them
    kept_bits: np.ndarray | None = field(default=None, compare=False)  # uint8: each shard's samples as whole bytes

    def __reduce__(self) -> tuple[object, ...]:
        if self.kept_bits is not None:  # they stay in their file, which may be another by now
            _load_keep(self.path, self._keep_digest)
        return _reopen, (self.path, self.shards, self.counts, self.kept_bits is not None)

    @cached_property
    def hash(self) -> str:
        """Identifies the data: names, sizes and what is kept. Moved shards and newly signed URLs keep it."""
        digest = hashlib.sha256(self._keep_digest.encode())
        for shard in self.shards:
            line = f"{file_name(shard.location)}\0{shard.bytes}\0{shard.indexed}\0{shard.samples}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def samples(self) -> int:
        """Samples in all shards that a run may read."""
        return sum(shard.samples for shard in self.shards)

    def kept(self, shard: int) -> np.ndarray | None:
        """Which of a shard's indexed samples are kept, ascending (n,) int64; None for all."""
        bits = self.bits(shard)
        return None if bits is None else rows_kept(bits, self.shards[shard].indexed)

    def bits(self, shard: int) -> np.ndarray | None:
        """The same as it is stored: uint8, eight samples each."""
        if self.kept_bits is None:
            return None
        start, stop = self._keep_starts[shard : shard + 2]
        return self.kept_bits[start:stop]

    def index_path(self, shard: int) -> Path:
        """Where the byte ranges of a shard's samples are kept."""
        entry = self.shards[shard]
        return index_folder(self.path) / index_name(relative(entry.location, self.path), entry.bytes, entry.version)

    @classmethod
    def load(cls, path: Path, *, complete: bool = True) -> Manifest:
        """Reads a manifest and, if it has to be complete, checks that its local shards are there.

        Raises:
            DataError: No such file, it cannot be opened, is not a manifest, or a shard is missing.
        """
        path = normalised(path)
        content, raw_shards = _read_json(path)
        folder = path.parent
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads format {FORMAT}")
            shards = tuple(_shard(row, folder) for row in raw_shards)
            counts, keep_digest = str(content["counts"]), str(content.get("keep", ""))
            if counts not in ("headers", "stats"):
                raise ValueError(f"counts {counts!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_manifest(path, error) from None
        if complete:
            _check_present(shards)
        manifest = cls(path, shards, counts, _load_keep(path, keep_digest) if keep_digest else None)
        if manifest.kept_bits is not None and len(manifest.kept_bits) != manifest._keep_starts[-1]:
            raise DataError(f"{keep_path(path)} does not fit {path}: {INDEX_AGAIN}.")
        return manifest

    def save(self) -> None:
        """Writes the manifest, and what is kept, so that each is there whole or not at all."""
        content: dict[str, object] = {"format": FORMAT, "counts": self.counts}
        if self.kept_bits is None:
            with suppress(OSError):
                keep_path(self.path).unlink()
        else:
            content["keep"] = self._keep_digest
            save_array(keep_path(self.path), self.kept_bits)
        head = json.dumps(content, allow_nan=False)[:-1]
        lines = ",\n".join(f"  {json.dumps(self._row(shard), allow_nan=False)}" for shard in self.shards)
        text = f'{head}, "shards": [\n{lines}\n]}}\n'
        write_atomically(self.path, lambda tmp: tmp.write_text(text, encoding="utf-8"))

    @cached_property
    def _keep_digest(self) -> str:
        return "" if self.kept_bits is None else _digest(self.kept_bits)

    @cached_property
    def _keep_starts(self) -> np.ndarray:
        return np.array([0, *accumulate(_bytes_for(shard.indexed) for shard in self.shards)])

    def _row(self, shard: Shard) -> dict[str, object]:
        row: dict[str, object] = {
            "path": relative(shard.location, self.path),
            "samples": shard.samples,
            "bytes": shard.bytes,
        }
        if shard.indexed != shard.samples:
            row["indexed"] = shard.indexed
        return row | {name: value for name in ("version", "sha256") if (value := getattr(shard, name))}


def _reopen(path: Path, shards: tuple[Shard, ...], counts: Literal["headers", "stats"], has_keep: bool) -> Manifest:
    return Manifest(path, shards, counts, np.load(keep_path(path), mmap_mode="r") if has_keep else None)


def rows_kept(bits: np.ndarray, indexed: int) -> np.ndarray:
    """The numbers of a shard's samples whose bits are set, ascending (n,) int64."""
    return np.flatnonzero(np.unpackbits(bits, count=indexed))


def index_folder(manifest: Path) -> Path:
    """The folder of the byte ranges that belong to a manifest."""
    return manifest.with_name(f"{manifest.stem}.index")


def keep_path(manifest: Path) -> Path:
    """The file of the bits that say which samples are kept."""
    return manifest.with_name(f"{manifest.stem}.keep.npy")


def index_name(relative: str, size: int, version: str) -> str:
    """The name of a shard's file in the index folder; another name once the shard is another."""
    return hashlib.sha256(f"{relative}\n{size}\n{version}".encode(errors="surrogateescape")).hexdigest()[:24] + ".npy"


def check_size(shard: Shard) -> None:
    """Raises DataError where a local shard is missing or has changed size since it was indexed."""
    try:
        found = os.stat(shard.location).st_size  # noqa: PTH116
    except OSError:
        raise _missing(shard.location) from None
    if found != shard.bytes:
        raise DataError(
            f"Shard {shard.location} has {found:,} bytes but had {shard.bytes:,} when it was indexed: {AGAIN}."
        )


def normalised(path: Path) -> Path:
    """Absolute and without `..`, but with symbolic links as they are: shards are often links into a store."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a temporary file and renames it to `path`: the file is there whole or not at all."""
    # Tasks on several machines may write one file at the same time, and processes of two have the same numbers.
    tmp = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        tmp.replace(path)
    except OSError as error:
        with suppress(OSError):
            tmp.unlink()
        raise cannot_write(str(path), error) from None


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array to a .npy file that is there whole or not at all."""

    def write(tmp: Path) -> None:
        with tmp.open("wb") as file:  # numpy adds .npy to a bare name
            np.save(file, array)

    write_atomically(path, write)


def _digest(bits: np.ndarray) -> str:
    return hashlib.sha256(bits.data).hexdigest()


def _bytes_for(bits: int) -> int:
    return (bits + 7) // 8


def _read_json(path: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
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
        shards = content.pop("shards")
        if not isinstance(shards, list):
            raise TypeError("shards are no list")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_manifest(path, error) from None
    return content, shards


def _shard(row: dict[str, object], folder: Path) -> Shard:
    path, samples, size = str(row["path"]), row["samples"], row["bytes"]
    indexed = row.get("indexed", samples)
    if not all(type(number) is int and number >= 0 for number in (samples, size, indexed)) or indexed < samples:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"the numbers of {path}")
    location = path if is_remote(path) else os.path.normpath(folder / path)
    return Shard(location, samples, size, indexed, str(row.get("version", "")), str(row.get("sha256", "")))  # pyright: ignore[reportArgumentType]


def _check_present(shards: tuple[Shard, ...]) -> None:
    # One listing per folder: a hundred thousand calls of stat take minutes on a network file system.
    listed: dict[str, set[str]] = {}
    for shard in shards:
        if is_remote(shard.location):
            continue
        folder, name = os.path.split(shard.location)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder))  # noqa: PTH208
            except OSError:
                listed[folder] = set()
        if name not in listed[folder]:
            raise _missing(shard.location)


def _load_keep(path: Path, digest: str) -> np.ndarray:
    try:
        bits = np.load(keep_path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{keep_path(path)} cannot be read ({type(error).__name__}): {INDEX_AGAIN}.") from None
    if _digest(bits) != digest:
        raise DataError(f"{keep_path(path)} is not the one that {path} was written with: {INDEX_AGAIN}.")
    return bits


def relative(location: str, manifest: Path) -> str:
    """A local shard's path as the manifest writes it; a URL as it is."""
    if is_remote(location):
        return location
    folder = f"{manifest.parent}{os.sep}"
    return location.removeprefix(folder) if location.startswith(folder) else location


def _missing(location: str) -> DataError:
    return DataError(f"Shard {location} is in the manifest but cannot be found: put it back, or {INDEX_AGAIN}.")


def _no_manifest(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a manifest of shards ({type(error).__name__}: {error}): {INDEX_AGAIN}.")
