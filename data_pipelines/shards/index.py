"""Makes manifests: one scan of each shard finds its samples, and filters say which of them are kept.

All filtering happens here, so that nothing has to be skipped while training. What a scan found stays in the
manifest's index folder: a second run, after an interruption or with other filters, scans only what is missing there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError, MissingError
from data_pipelines.parallel import each_done
from data_pipelines.shards.filters import Duplicates, Filters
from data_pipelines.shards.maker_count import maker_count
from data_pipelines.shards.manifest import Manifest, Shard, index_folder, index_name, normalised, relative
from data_pipelines.shards.problems import REPLACED, Exclusions, Problem
from data_pipelines.shards.sample import NEEDED, Fault, fix_of
from data_pipelines.shards.scan import FeatureFields, ReadAhead, features, label_at, scan
from data_pipelines.shards.seal import Seal
from data_pipelines.shards.tar import printable
from data_pipelines.storage.addresses import file_name, is_remote, shown
from data_pipelines.storage.files import describe, open_bytes
from data_pipelines.storage.source import ByteSource, sha256_of
from data_pipelines.text import counted

_COUNTED_AT_ONCE = 16  # shards; each remote one takes a few short requests


@dataclass
class Report:
    """What became of the samples of a manifest."""

    faults: list[Problem] = field(default_factory=list)  # left out although no filter asks for it
    filtered: Counter[str] = field(default_factory=Counter)  # samples by reason
    reused: int = 0  # shards whose scan was there already
    replaced: list[Problem] = field(default_factory=list)  # shards that are not what an earlier checksum says
    left_out: list[str] = field(default_factory=list)  # shards that are on the list of exclusions
    unmatched: list[tuple[str, str]] = field(default_factory=list)  # (shard, key) on that list that are not there

    @property
    def broken(self) -> list[Problem]:
        """What is wrong with whole shards."""
        return [fault for fault in self.faults if not fault.key] + self.replaced


@dataclass(frozen=True)
class _Scan:
    """What one process does to a shard, and where the results go."""

    folder: Path  # the index folder
    manifest: Path
    names: FeatureFields | None
    checksums: bool
    known_sums: dict[str, str]  # SHA-256 by location, as the manifest said before
    patience_s: float

    def __call__(self, location: str) -> _Scanned | None:
        """None where the shard is missing."""
        try:
            size, version = describe(location, patience_s=self.patience_s)
        except MissingError:
            return None
        path = self.folder / index_name(relative(location, self.manifest), size, version)
        described = self.names and features_path(path, self.names)
        seal, known_sum = Seal.of(path, location, version), self.known_sums.get(location, "")
        rows, table = seal.load(path), described and seal.load(described)
        # Without a version, nothing else could tell a copy in a node's cache from a file that has changed.
        must_sum = not seal.sha256 and (self.checksums or known_sum or (is_remote(location) and not version))
        reused = rows is not None and (table is not None or not described) and not must_sum
        if not reused:
            with closing(self._opened(location)) as source:
                if rows is None:
                    rows = scan(source)
                    seal.save(path, rows)
                if described and self.names and table is None:
                    table = features(source, rows, self.names)
                    seal.save(described, table)
                if must_sum:
                    seal.sha256 = sha256_of(source)
            seal.write()
        assert rows is not None
        shard = Shard(location, len(rows), size, len(rows), version, seal.sha256)
        problems = self._problems(location, rows, _faults(rows, table))
        detail = f"{seal.sha256} instead of {known_sum}"
        replaced = [Problem(location, "", REPLACED, detail)] if known_sum not in ("", seal.sha256) else []
        return _Scanned(shard, path, problems, reused, replaced)

    def _opened(self, location: str) -> ByteSource:
        return ReadAhead(open_bytes(location, patience_s=self.patience_s), is_remote(location))

    def _problems(self, location: str, rows: np.ndarray, faults: np.ndarray) -> list[Problem]:
        bad = np.flatnonzero(faults)
        if not bad.size:
            return []
        with closing(self._opened(location)) as source:
            found = [Problem.of_row(location, source, (*rows[n, :2].tolist(), int(faults[n]))) for n in bad.tolist()]
        if not found[-1].key and (lost := self._lost(location, rows)):  # the shard is not whole
            found[-1] = replace(found[-1], detail=f"{found[-1].detail}, {lost}")
        return found

    def _lost(self, location: str, rows: np.ndarray) -> str:
        """How many samples damage has taken, as far as it can be known."""
        whole, made = len(rows) - 1, None
        with suppress(DataError):
            made = maker_count(location, self.patience_s)
        if made is not None:
            return f"{counted(max(0, made - whole), 'sample')} by the count of its maker"
        if not whole or Fault(rows[-1, 2]) != Fault.DAMAGED:
            return ""
        start, stop = rows[-1, :2].tolist()
        return f"some {counted(max(1, round((stop - start) * whole / start)), 'sample')} by the size of those before"


@dataclass(frozen=True)
class _Scanned:
    shard: Shard
    path: Path  # of its rows
    faults: list[Problem]
    reused: bool
    replaced: list[Problem]


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
        MissingError: Shards are missing; it names all of them.
    """
    filters, path = filters or Filters(), normalised(path)
    names = filters.fields if filters.need_features else None
    job = _Scan(index_folder(path), path, names, checksums, _known_sums(path), patience_s)
    named = [_place(place) for place in locations]
    exclusions = Exclusions.load(filters.exclude, named)
    excluded = dict(zip(named, exclusions.keys, strict=True))
    places = [place for place in named if "" not in excluded[place]]
    if not places:
        raise DataError(
            f"{filters.exclude} lists as a whole all that are named ({counted(len(named), 'shard')}): name others."
        )
    by_number: dict[int, _Scanned | None] = {}
    for number, found in each_done(job, places, processes):
        by_number[number] = found
        on_shard()
    if missing := [shown(places[number]) for number, found in sorted(by_number.items()) if found is None]:
        raise MissingError.of(missing, len(places))
    scanned = [found for _, found in sorted(by_number.items()) if found]
    report = Report(
        faults=[fault for found in scanned for fault in found.faults],
        reused=sum(found.reused for found in scanned),
        replaced=[problem for found in scanned for problem in found.replaced],
        left_out=[place for place in named if "" in excluded[place]],
        unmatched=exclusions.elsewhere,
    )
    kept = _apply(filters, names, scanned, [excluded[place] for place in places], report)
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

    path = normalised(path)

    def count(location: str) -> Shard | None:
        try:
            size, version = describe(location, patience_s=patience_s)
        except MissingError:
            return None
        samples = maker_count(location, patience_s)
        if samples is None:
            stem = location.removesuffix(".tar")
            raise DataError(
                f"Beside {shown(location)} there is neither {file_name(stem)}_stats.json nor .parquet: index it "
                f"without --trust-stats, which reads its headers."
            )
        seal = Seal.of(index_folder(path) / index_name(relative(location, path), size, version), location, version)
        return Shard(location, samples, size, samples, version, seal.sha256)

    found: list[Shard | None] = []
    places = [_place(place) for place in locations]
    with ThreadPoolExecutor(_COUNTED_AT_ONCE) as pool:
        for shard in pool.map(count, places):
            found.append(shard)
            on_shard()
    if missing := [shown(place) for place, shard in zip(places, found, strict=True) if shard is None]:
        raise MissingError.of(missing, len(places))
    shards = [shard for shard in found if shard]
    manifest = Manifest(path, tuple(shards), "stats")
    if manifest.samples == 0:
        raise _nothing_usable(shards, Report())
    return manifest


_FEATURES_VERSION = 2  # raise it when the same bytes give other features


def features_path(rows: Path, names: FeatureFields) -> Path:
    """Where the features that go with a shard's rows are kept."""
    digest = hashlib.sha256(f"{_FEATURES_VERSION}\0{names.score}\0{names.language}".encode()).hexdigest()[:8]
    return rows.with_suffix(f".features-{digest}.npy")


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
        rows = np.load(found.path)
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
    with closing(open_bytes(location, patience_s=300)) as source:
        labels = [label_at(source, start) for start in rows[:, 0].tolist()]
    fits = np.array([label not in keys for label in labels], dtype=bool)
    report.unmatched += [(location, key) for key in sorted(keys.difference(labels))]
    report.filtered["on the list of excluded samples"] += int(np.count_nonzero(~fits))
    return fits


def _place(location: str | Path) -> str:
    return str(location) if is_remote(str(location)) else str(normalised(Path(location)))


def _known_sums(path: Path) -> dict[str, str]:
    """What a manifest that is about to be replaced says of its shards."""
    try:
        return {shard.location: shard.sha256 for shard in Manifest.load(path, complete=False).shards if shard.sha256}
    except DataError:
        return {}


def _nothing_usable(shards: Sequence[Shard], report: Report) -> DataError:
    reasons = Counter(fault.reason for fault in report.faults) + report.filtered
    why = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(5))
    where, fixes = shown(shards[0].location) if shards else "none", []
    if report.faults:
        first = report.faults[0]
        where = f"{printable(first.key)} in {shown(first.shard)}" if first.key else shown(first.shard)
        where += f": {first.detail}" if first.detail else ""
        fixes = [fix for reason, _ in reasons.most_common() if (fix := fix_of(reason))]
    fixes = list(dict.fromkeys(fixes)) or [NEEDED]
    if report.filtered:
        fixes = ["let the filters keep more"]
    return DataError(
        f"No usable sample in {counted(len(shards), 'shard')} ({why or 'they are empty'}; the first is {where}): "
        f"{'; '.join(fixes)}."
    )
