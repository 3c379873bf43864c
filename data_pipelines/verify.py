"""Reads every byte of a corpus as training would, and lists what training would stumble over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from data_pipelines.decode import check_image
from data_pipelines.errors import DataError, SampleError
from data_pipelines.index import sha256_of
from data_pipelines.manifest import write_atomically
from data_pipelines.parallel import each_done
from data_pipelines.sample import Fault, parse_sample
from data_pipelines.scan import key_at, scan
from data_pipelines.sources import Source
from data_pipelines.storage import ByteSource
from data_pipelines.tar import TarError
from data_pipelines.text import to_json

MISSING = "the shard cannot be read"
CHANGED = "the shard has changed since it was indexed"
WRONG_SUM = "the SHA-256 of the shard is not the manifest's"
WRONG_COUNT = "the shard holds more or fewer samples than the manifest says"
WRONG_INDEX = "the index does not fit the shard"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a sample, or with a whole shard."""

    shard: str
    key: str  # empty for the shard
    reason: str
    detail: str = ""


@dataclass
class Verdict:
    """What was read, and what is wrong with it."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(
    sources: Sequence[Source], *, processes: int | None = None, on_shard: Callable[[], None] = lambda: None
) -> Verdict:
    """Checks sizes and checksums where the manifest has them, the index, every image and every caption.

    Only samples that a manifest keeps are checked, since only those are read: a manifest that was written with
    `--exclude` and the problems found here has none left.

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
        total.problems += verdict.problems
    return total


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes one JSON object a line, as `index --exclude` reads them."""
    rows = ({name: value for name, value in asdict(found).items() if name != "detail" or value} for found in problems)
    text = "".join(to_json(row) + "\n" for row in rows)
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def _verify_shard(shard: Source) -> Verdict:
    try:
        source = replace(shard, entry=None).open(ahead=True)  # whatever its size
    except DataError as error:
        return Verdict(problems=[Problem(shard.location, "", MISSING, str(error))])
    verdict, entry = Verdict(bytes=source.size), shard.entry
    try:
        if entry and (source.size != entry.bytes or (entry.version and source.version != entry.version)):
            detail = f"{source.size:,} bytes {source.version}".rstrip()
            detail = f"{detail} instead of {entry.bytes:,} bytes {entry.version}".rstrip()
            verdict.problems.append(Problem(shard.location, "", CHANGED, detail))
        else:
            _verify_bytes(shard, source, verdict)
    except DataError as error:  # in the middle of a read
        verdict.problems.append(Problem(shard.location, "", MISSING, str(error)))
    finally:
        source.close()
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
            if (stored := shard.indexed()) is not None and not np.array_equal(stored, rows):
                report(WRONG_INDEX, detail=f"remove {shard.index}: it is made anew when it is needed")
    for start, stop, fault in rows[kept].tolist():
        verdict.samples += 1
        if fault:
            report(Fault(fault).reason, key_at(source, start) or f"byte {start:,}")
            continue
        try:
            sample = parse_sample(shard.location, source.read(start, stop - start))
            sample.captions()
            check_image(sample.image)
        except (SampleError, TarError) as error:
            report(str(error), key_at(source, start))
