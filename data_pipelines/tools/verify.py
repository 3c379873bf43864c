"""Reads every byte of a corpus as training would, and lists what training would stumble over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.errors import DataError, SampleError
from data_pipelines.parallel import each_done
from data_pipelines.samples.decode import check_image
from data_pipelines.shards.problems import CHANGED, MISSING, WRONG_COUNT, WRONG_INDEX, WRONG_SUM, Problem
from data_pipelines.shards.sample import Fault, parse_sample
from data_pipelines.shards.scan import ReadAhead, label_at, scan
from data_pipelines.shards.tar import TarError
from data_pipelines.storage.addresses import is_remote
from data_pipelines.storage.files import open_bytes
from data_pipelines.storage.source import ByteSource, sha256_of
from data_pipelines.tools.sources import PATIENCE_S, Source


@dataclass
class Verdict:
    """What was read, and what is wrong with it."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    left_out: int = 0  # samples that the manifest does not keep, which are not read
    without_sum: int = 0  # shards that no checksum is known of
    problems: list[Problem] = field(default_factory=list)


def verify(
    sources: Sequence[Source], *, processes: int | None = None, on_shard: Callable[[], None] = lambda: None
) -> Verdict:
    """Checks sizes and checksums where the manifest has them, the index, every image and every caption.

    Of the samples, those that a manifest keeps are checked, since only those are read; a shard that is not whole is a
    problem whatever is kept of it. A manifest that was written with `--exclude` and the problems found has none left.

    Args:
        sources: The shards; one that is missing is a problem like any other.
        processes: By default one per core.
        on_shard: Called as each shard is done.

    Returns:
        The problems in the order of the shards and the samples.
    """
    verdicts: dict[int, Verdict] = {}
    for number, verdict in each_done(_verify_shard, sources, processes):
        verdicts[number] = verdict
        on_shard()
    total = Verdict()
    for _, verdict in sorted(verdicts.items()):
        total.shards += 1
        total.samples += verdict.samples
        total.bytes += verdict.bytes
        total.left_out += verdict.left_out
        total.without_sum += verdict.without_sum
        total.problems += verdict.problems
    return total


def _verify_shard(shard: Source) -> Verdict:
    verdict, entry = Verdict(), shard.entry
    sha256 = entry.sha256 if entry else ""
    verdict.without_sum = int(not sha256)
    try:
        # Whatever its size and version; of several versions in turn, a checksum decides.
        found = open_bytes(shard.location, patience_s=PATIENCE_S, version=None if sha256 else "")
        with closing(ReadAhead(found, is_remote(shard.location))) as source:
            verdict.bytes = source.size
            is_another = entry and not sha256 and entry.version and source.version != entry.version
            if entry and (source.size != entry.bytes or is_another):
                detail = f"{source.size:,} bytes {source.version}".rstrip()
                detail = f"{detail} instead of {entry.bytes:,} bytes {entry.version}".rstrip()
                verdict.problems.append(Problem(shard.location, "", CHANGED, detail))
            else:
                _verify_bytes(shard, source, verdict)
    except DataError as error:  # on opening it, or in the middle of a read
        verdict.problems.append(Problem(shard.location, "", MISSING, str(error)))
    return verdict


def _verify_bytes(shard: Source, source: ByteSource, verdict: Verdict) -> None:
    def report(reason: str, key: str = "", detail: str = "") -> None:
        verdict.problems.append(Problem(shard.location, key, reason, detail))

    rows, entry = scan(source), shard.entry
    kept = np.arange(len(rows))
    if entry is not None:
        if entry.sha256 and (found := sha256_of(source)) != entry.sha256:
            report(WRONG_SUM, detail=f"{found} instead of {entry.sha256}")
        if len(rows) != entry.indexed:
            report(WRONG_COUNT, detail=f"{len(rows):,} instead of {entry.indexed:,}")
        else:
            kept = shard.kept(len(rows))
            if (stored := shard.stored()) is not None and not np.array_equal(stored, rows):
                report(WRONG_INDEX, detail=str(shard.index))
    is_checked = np.zeros(len(rows), dtype=bool)
    is_checked[kept] = True
    is_whole = np.array([not Fault(fault).is_of_shard for fault in rows[:, 2].tolist()], dtype=bool)
    verdict.left_out = int(np.count_nonzero(is_whole & ~is_checked))
    for start, stop, fault in rows[is_checked | ~is_whole].tolist():
        if fault:
            verdict.problems.append(Problem.of_row(shard.location, source, (start, stop, fault)))
            verdict.samples += bool(verdict.problems[-1].key)
            continue
        verdict.samples += 1
        try:
            sample = parse_sample(shard.location, source.read(start, stop - start))
            sample.captions()
            check_image(sample.image)
        except (SampleError, TarError) as error:
            report(str(error), label_at(source, start))
