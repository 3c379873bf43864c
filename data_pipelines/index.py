"""Makes manifests: one scan of each shard finds its samples, and filters say which of them are kept.

All filtering happens here, so that nothing has to be skipped while training. What a scan found stays in the
manifest's index folder: a second run, after an interruption or with other filters, scans only what is missing there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.filters import Duplicates, Filters
from data_pipelines.manifest import (
    Manifest,
    Shard,
    index_folder,
    index_name,
    normalised,
    relative,
    save_array,
    write_atomically,
)
from data_pipelines.parallel import each_done
from data_pipelines.sample import IMAGE_EXTENSIONS, Fault
from data_pipelines.scan import READ_AHEAD, FeatureFields, ReadAhead, features, key_at, scan
from data_pipelines.storage import ByteSource, describe, file_name, is_remote, open_bytes, shown
from data_pipelines.tar import printable

_COUNTED_AT_ONCE = 16  # shards: a remote one takes a few requests of a moment each


@dataclass(frozen=True)
class Dropped:
    """A sample that no filter asked to leave out, and that is left out all the same."""

    shard: str
    key: str
    reason: str


@dataclass
class Report:
    """What became of the samples of a manifest."""

    faults: list[Dropped] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)  # samples by reason
    reused: int = 0  # shards whose scan was there already


@dataclass(frozen=True)
class _Scan:
    """What one process does to a shard, and where the results go."""

    folder: Path  # the index folder
    manifest: Path
    names: FeatureFields | None
    checksums: bool
    patience_s: float

    def __call__(self, location: str) -> _Scanned:
        size, version = describe(location, patience_s=self.patience_s)
        path = self.folder / index_name(relative(location, self.manifest), size, version)
        checksum = path.with_suffix(".sha256")
        described = self.names and features_path(path, self.names)
        rows = _load(path) if self._is_current(path, location) else None
        must_describe = described is not None and not self._is_current(described, location)
        must_sum = self.checksums and not self._is_current(checksum, location)
        reused = rows is not None and not must_describe and not must_sum
        if not reused:
            with closing(ReadAhead(self._opened(location), is_remote(location))) as source:
                if rows is None:
                    rows = scan(source)
                    save_array(path, rows)
                if must_describe and self.names and described:
                    save_array(described, features(source, rows, self.names))
                if must_sum:
                    digest = sha256_of(source)
                    write_atomically(checksum, lambda tmp: tmp.write_text(digest))
        assert rows is not None
        digest = checksum.read_text() if self.checksums else ""
        dropped = self._dropped(location, rows, _faults(rows, described and np.load(described)))
        return _Scanned(Shard(location, len(rows), size, len(rows), version, digest), path, dropped, reused)

    def _opened(self, location: str) -> ByteSource:
        return open_bytes(location, patience_s=self.patience_s)

    def _dropped(self, location: str, rows: np.ndarray, faults: np.ndarray) -> list[Dropped]:
        if not faults.any():
            return []
        with closing(self._opened(location)) as source:
            return [
                Dropped(location, key_at(source, start) or f"byte {start:,}", Fault(fault).reason)
                for start, fault in zip(rows[:, 0].tolist(), faults.tolist(), strict=True)
                if fault
            ]

    def _is_current(self, path: Path, location: str) -> bool:
        """Whether a file of the index is there, and no older than its shard."""
        try:
            return path.stat().st_mtime_ns >= (0 if is_remote(location) else os.stat(location).st_mtime_ns)  # noqa: PTH116
        except OSError:
            return False


@dataclass(frozen=True)
class _Scanned:
    shard: Shard
    path: Path  # of its rows
    dropped: list[Dropped]
    reused: bool


def build_manifest(
    locations: Sequence[str | Path],
    path: Path,
    *,
    filters: Filters | None = None,
    checksums: bool = False,
    processes: int | None = None,
    patience_s: float = 300,
    on_shard: Callable[[], None] = lambda: None,
) -> tuple[Manifest, Report]:
    """Scans every shard once, in parallel, and applies the filters.

    Args:
        locations: The tars, paths or URLs, in the manifest's order.
        path: Where the manifest will be saved.
        filters: Which samples to keep; by default all without a fault.
        checksums: Also take each shard's SHA-256, which reads all of it.
        processes: By default one per core; 1 scans in this process.
        patience_s: How long a remote read is tried again.
        on_shard: Called as each shard is done.

    Returns:
        The manifest, not yet saved, and what was left out.

    Raises:
        DataError: A shard cannot be read, or there is nothing usable.
    """
    filters, path = filters or Filters(), normalised(path)
    names = filters.fields if filters.need_features else None
    job = _Scan(index_folder(path), path, names, checksums, patience_s)
    places = [str(place) if is_remote(str(place)) else str(normalised(Path(place))) for place in locations]
    excluded = filters.excluded(places)
    by_number: dict[int, _Scanned] = {}
    for number, found in each_done(job, places, processes):
        by_number[number] = found
        on_shard()
    scanned = [by_number[number] for number in range(len(places))]
    report = Report(
        faults=[drop for found in scanned for drop in found.dropped], reused=sum(found.reused for found in scanned)
    )
    kept = _apply(filters, names, scanned, excluded, report)
    shards = tuple(
        Shard(s.location, int(np.count_nonzero(keep)), s.bytes, s.indexed, s.version, s.sha256)
        for s, keep in zip((found.shard for found in scanned), kept, strict=True)
    )
    all_kept = all(shard.samples == shard.indexed for shard in shards)
    bits = None if all_kept else np.concatenate([np.packbits(keep) for keep in kept])
    manifest = Manifest(path, shards, "headers", bits)
    if manifest.samples == 0:
        raise _nothing_usable(shards, report)
    return manifest, report


def count_from_stats(
    locations: Sequence[str | Path], path: Path, *, patience_s: float = 300, on_shard: Callable[[], None] = lambda: None
) -> Manifest:
    """A manifest from what img2dataset wrote beside its tars, which are not read.

    The count is `successes` of `NNNNN_stats.json`, or else the rows of `NNNNN.parquet` whose status is success.
    Byte ranges are found when a shard is first read; a sample without a caption is replaced while training.

    Raises:
        DataError: A shard has neither file, or they cannot be read.
    """

    def count(place: str | Path) -> Shard:
        location = str(place) if is_remote(str(place)) else str(normalised(Path(place)))
        size, version = describe(location, patience_s=patience_s)
        samples = _count(location, patience_s)
        return Shard(location, samples, size, samples, version)

    shards: list[Shard] = []
    with ThreadPoolExecutor(_COUNTED_AT_ONCE) as pool:
        for shard in pool.map(count, locations):
            shards.append(shard)
            on_shard()
    manifest = Manifest(normalised(path), tuple(shards), "stats")
    if manifest.samples == 0:
        raise _nothing_usable(shards, Report())
    return manifest


_FEATURES_VERSION = 2  # changes where the same bytes give other features


def features_path(rows: Path, names: FeatureFields) -> Path:
    """Where the features that go with a shard's rows are kept."""
    digest = hashlib.sha256(f"{_FEATURES_VERSION}\0{names.score}\0{names.language}".encode()).hexdigest()[:8]
    return rows.with_suffix(f".features-{digest}.npy")


def sha256_of(source: ByteSource) -> str:
    """Hexadecimal, of all bytes."""
    digest = hashlib.sha256()
    for offset in range(0, source.size, READ_AHEAD):
        digest.update(source.read(offset, READ_AHEAD))
    return digest.hexdigest()


def _apply(
    filters: Filters,
    names: FeatureFields | None,
    scanned: list[_Scanned],
    excluded: list[set[str]],
    report: Report,
) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    duplicates = Duplicates(filters.unique)
    for found, keys in zip(scanned, excluded, strict=True):
        rows = _load(found.path)
        assert rows is not None, found.path
        table = names and np.load(features_path(found.path, names))
        keep = _faults(rows, table) == Fault.NONE
        if keys:
            keep &= _not_excluded(found.shard.location, rows, keys, report)
        if table is not None:
            keep[keep] = filters.keep(table[keep], report.filtered)
            duplicates.add(table[keep])
        kept.append(keep)
    if filters.unique:
        for keep, first in zip(kept, duplicates.keep(report.filtered), strict=True):
            keep[keep] = first
    report.filtered = +report.filtered  # without the reasons that no sample had
    return kept


def _faults(rows: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """(n,) Fault of each sample: what the scan found and, with the features, captions that cannot be read."""
    faults = rows[:, 2].copy()
    if table is not None:
        faults[(faults == Fault.NONE) & (table["caption_characters"] == 0)] = Fault.BAD_CAPTION
    return faults


def _not_excluded(location: str, rows: np.ndarray, keys: set[str], report: Report) -> np.ndarray:
    source = open_bytes(location, patience_s=300)
    try:
        fits = np.array([key_at(source, start) not in keys for start in rows[:, 0].tolist()], dtype=bool)
    finally:
        source.close()
    report.filtered["on the list of excluded samples"] += int(np.count_nonzero(~fits))
    return fits


def _load(path: Path) -> np.ndarray | None:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 3 else None


def _count(location: str, patience_s: float) -> int:
    stem = location.removesuffix(".tar")
    for name, count in ((f"{stem}_stats.json", _count_stats), (f"{stem}.parquet", _count_parquet)):
        try:
            source = open_bytes(name, patience_s=patience_s)
        except DataError:
            continue
        try:
            return count(source.read(0, source.size))
        except Exception as error:  # whatever a parser says of bytes that are no such file
            raise DataError(
                f"{shown(name)} does not say how many samples {shown(location)} holds ({type(error).__name__}): index "
                f"it without --trust-stats, which reads its headers."
            ) from None
        finally:
            source.close()
    raise DataError(
        f"Beside {shown(location)} there is neither {file_name(stem)}_stats.json nor .parquet: index it without "
        f"--trust-stats, which reads its headers."
    )


def _count_stats(content: bytes) -> int:
    return int(json.loads(content)["successes"])


def _count_parquet(content: bytes) -> int:
    from pyarrow import BufferReader, parquet  # takes half a second

    status = parquet.read_table(BufferReader(content), columns=["status"]).column("status")
    return sum(value == "success" for value in status.to_pylist())


def _nothing_usable(shards: Sequence[Shard], report: Report) -> DataError:
    reasons = Counter(drop.reason for drop in report.faults) + report.filtered
    why = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(5))
    where = shown(shards[0].location) if shards else "none"
    if report.faults:
        where = f"{printable(report.faults[0].key)} in {shown(report.faults[0].shard)}"
    fix = "let the filters keep more"
    if not report.filtered:
        extensions = ", ".join(IMAGE_EXTENSIONS)
        fix = f"a sample needs an image ({extensions}) and a caption (.txt, or `caption` in .json) under one key"
    return DataError(
        f"No usable sample in {len(shards):,} shards ({why or 'they are empty'}; the first is {where}): {fix}."
    )
