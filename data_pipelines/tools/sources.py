"""The shards that a tool reads, named by manifests or found by patterns, and which of them are this part's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest, Shard, check_size, rows_kept
from data_pipelines.shards.scan import ReadAhead, scan
from data_pipelines.shards.seal import Seal
from data_pipelines.storage.addresses import is_remote, shown
from data_pipelines.storage.files import expand, open_bytes
from data_pipelines.storage.source import ByteSource
from data_pipelines.storage.wording import AGAIN
from data_pipelines.stream.reader import fits
from data_pipelines.text import counted

PATIENCE_S = 300.0  # of a remote read

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A shard that a tool reads."""

    number: int  # among all that were named
    location: str
    entry: Shard | None = None  # what a manifest says of it
    index: Path | None = None  # where that manifest keeps its byte ranges
    bits: np.ndarray | None = None  # one bit per sample, set if it is kept; None for all

    def open(self, *, ahead: bool) -> ByteSource:
        """Opens it.

        Args:
            ahead: All of it will be read, so that a remote is read in large pieces.

        Raises:
            DataError: It cannot be opened, or is not what the manifest says.
        """
        entry = self.entry
        if entry is None:
            source = open_bytes(self.location, patience_s=PATIENCE_S)
        else:
            if not is_remote(self.location):
                check_size(entry)
            known = {"size": entry.bytes, "version": entry.version, "sha256": entry.sha256}
            source = open_bytes(self.location, patience_s=PATIENCE_S, **known)
        return ReadAhead(source, ahead and is_remote(self.location))

    def stored(self) -> np.ndarray | None:
        """(n, 3) int64: start, stop and Fault of all its samples as the index has them; None where it has none."""
        if self.entry is None or self.index is None:
            return None
        try:
            rows = np.load(self.index, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return rows if fits(rows, self.entry) else None

    def rows(self, source: ByteSource) -> np.ndarray:
        """The same of the shard as it is, from a scan where the index is not known to be of this very file.

        Raises:
            DataError: The shard does not hold the samples that its manifest says.
        """
        entry, stored = self.entry, self.stored()
        if entry is not None and self.index is not None and stored is not None:
            seal = Seal.of(self.index, self.location, entry.version)
            if seal.load(self.index) is not None:
                return stored
        rows = scan(ReadAhead(source, is_remote(self.location)))
        if entry is not None and len(rows) != entry.indexed:
            raise DataError(
                f"Shard {shown(self.location)} holds {counted(len(rows), 'sample')} but the manifest counts "
                f"{entry.indexed:,}: it has changed; {AGAIN}."
            )
        if stored is not None and not np.array_equal(stored, rows):
            raise DataError(
                f"Shard {shown(self.location)} holds other samples than when it was indexed: it has changed; {AGAIN}."
            )
        return rows

    def kept(self, indexed: int) -> np.ndarray:
        """Which of so many rows are kept, ascending (n,) int64."""
        return np.arange(indexed) if self.bits is None else rows_kept(self.bits, indexed)


@dataclass(frozen=True, order=True)
class Part:
    """The `number`-th of `count` equal shares of the work, from 0, as the tasks of a Slurm array number them."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Reads `number/count`; all of the work where there is none.

        Raises:
            DataError: It is no such part.
        """
        if text is None:
            return WHOLE
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise DataError(
                f"--shard {text} is no part: write NUMBER/COUNT with numbers from 0, such as 0/8 to 7/8 for eight."
            )
        return cls(int(number), int(count))

    def of(self, items: Sequence[T]) -> list[T]:
        """This part's share."""
        return list(items[self.number :: self.count])

    def file(self, whole: Path) -> Path:
        """Where this part's share of a file is written."""
        name = f"{whole.stem}.{self.number:05d}-of-{self.count:05d}{whole.suffix}"
        return whole if self.count == 1 else whole.with_name(name)


WHOLE = Part(0, 1)


def name_sources(names: Sequence[str]) -> list[Source]:
    """Shards as they are named, which may be missing or damaged.

    Args:
        names: Manifests (.json) and whatever `expand` takes.

    Raises:
        DataError: A manifest cannot be read, or a pattern matches nothing.
    """
    manifests = [Manifest.load(Path(name), complete=False) for name in names if _is_manifest(name)]
    sources = [source for manifest in manifests for source in _entries(manifest)]
    patterns = [name for name in names if not _is_manifest(name)]
    sources += [Source(0, location) for location in (expand(patterns) if patterns else ())]
    return _numbered(sources)


def load_sources(
    names: Sequence[str], scratch: Path, *, processes: int | None = None, on_shard: Callable[[], None] = lambda: None
) -> list[Source]:
    """Shards whose samples are counted. Those that no scan has counted yet are scanned first.

    Args:
        names: Manifests (.json) and whatever `expand` takes.
        scratch: Folder for the byte ranges of what had to be scanned; it has to outlive the sources.
        processes: Scanning at the same time, by default one per core.
        on_shard: Called as each scan is done.

    Raises:
        DataError: A manifest or a shard cannot be read, or there is nothing usable.
    """
    manifests = [Manifest.load(Path(name)) for name in names if _is_manifest(name)]
    locations = [shard.location for manifest in manifests if manifest.counts == "stats" for shard in manifest.shards]
    if patterns := [name for name in names if not _is_manifest(name)]:
        locations += expand(patterns)
    counted = [manifest for manifest in manifests if manifest.counts == "headers"]
    if locations:
        found, _ = build_manifest(locations, scratch / "sources.json", processes=processes, on_shard=on_shard)
        counted.append(found)
    return _numbered([source for manifest in counted for source in _entries(manifest)])


def spread(total: int, limit: int | None) -> np.ndarray:
    """The positions of `limit` samples spread evenly over `total`, or of all, ascending (n,) int64."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.arange(limit) * total // limit


def by_source(sources: Sequence[Source], positions: np.ndarray) -> Iterator[tuple[Source, np.ndarray]]:
    """Groups ascending positions, counted over the kept samples of all sources, by their source.

    Yields:
        The source, and (n,) int64 positions among its kept samples.
    """
    stops = np.cumsum([source.entry.samples for source in sources if source.entry])
    edges = np.searchsorted(positions, stops)
    for source, first, last, stop in zip(sources, (0, *edges[:-1]), edges, stops, strict=True):
        assert source.entry is not None
        if first < last:
            yield source, positions[first:last] - (stop - source.entry.samples)


def _is_manifest(name: str) -> bool:
    return name.endswith(".json")


def _entries(manifest: Manifest) -> Iterator[Source]:
    for number, shard in enumerate(manifest.shards):
        yield Source(0, shard.location, shard, manifest.index_path(number), manifest.bits(number))


def _numbered(sources: list[Source]) -> list[Source]:
    return [Source(number, s.location, s.entry, s.index, s.bits) for number, s in enumerate(sources)]
