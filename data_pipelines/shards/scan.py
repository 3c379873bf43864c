"""One pass over a shard: where its samples are, what is wrong with them and, if asked, what they are like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import SampleError
from data_pipelines.shards.header import size_of
from data_pipelines.shards.sample import (
    Fault,
    Sample,
    caption_fault_of,
    fault_of,
    hash64,
    normalised_caption,
    parse_sample,
)
from data_pipelines.shards.tar import (
    Member,
    NoTarError,
    TarError,
    TrailingBytesError,
    iter_members,
    iter_samples,
    printable,
    split_name,
)
from data_pipelines.storage.source import ByteSource
from data_pipelines.text import number_of

READ_AHEAD = 8 << 20  # bytes of a remote shard that one request brings

_UID = re.compile("[0-9a-fA-F]{32}")

FEATURES = np.dtype(
    [
        ("width", "<u4"),  # pixels; 0 where the header cannot be read
        ("height", "<u4"),
        ("caption_characters", "<u4"),  # of the first caption; 0 where it cannot be read
        ("image_hash", "<u8"),
        ("caption_hash", "<u8"),  # after lower-casing and joining white space
        ("uid", "<u8", (2,)),  # DataComp's, from 32 hexadecimal digits
        ("score", "<f8"),  # NaN where the field is missing or no number
        ("language", "S16"),  # empty where the field is missing
    ]
)


@dataclass(frozen=True)
class FeatureFields:
    """Names of the json fields that features are taken from."""

    score: str = ""
    language: str = ""


class ReadAhead:
    """A source whose small reads of a remote object come out of large ones."""

    def __init__(self, source: ByteSource, remote: bool):
        self._source, self._block = source, READ_AHEAD if remote else 0
        self.size, self.version = source.size, source.version
        self._start, self._bytes = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        if size >= self._block:
            return self._source.read(offset, size)
        at = offset - self._start
        if at < 0 or at + size > len(self._bytes):
            self._start, self._bytes = offset, self._source.read(offset, self._block)
            at = 0
        return self._bytes[at : at + size]

    def close(self) -> None:
        self._source.close()


def scan(source: ByteSource) -> np.ndarray:
    """(n, 3) int64: start, stop and Fault of every sample of a tar, in their order.

    Never fails on what the bytes are: whatever follows the last whole sample of a damaged tar is one row.
    """
    rows: list[tuple[int, int, int]] = []
    known: dict[str, tuple[int, dict[str, Member]]] = {}  # by key: its first row, and all its members
    try:
        for sample in iter_samples(iter_members(source.read, source.size, whole=True)):
            fault = fault_of(sample, source.read) or caption_fault_of(sample, source.read)
            if sample.key in known:
                first, members = known[sample.key]
                fault = _fault_of_another(rows, first, fault, members.keys().isdisjoint(sample.members))
                members.update(sample.members)
            else:
                known[sample.key] = len(rows), sample.members
            rows.append((sample.start, sample.stop, fault))
    except TarError as error:
        start = rows[-1][1] if rows else 0
        fault = {NoTarError: Fault.NO_TAR, TrailingBytesError: Fault.TRAILING}.get(type(error), Fault.DAMAGED)
        rows.append((start, max(source.size, start), fault))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _fault_of_another(rows: list[tuple[int, int, int]], first: int, fault: Fault, others: bool) -> Fault:
    """The fault of a sample whose key came before; where each has what the other lacks, of both."""
    incomplete = (Fault.NO_IMAGE, Fault.NO_CAPTION, Fault.SCATTERED)
    if not others or (fault not in incomplete and rows[first][2] not in incomplete):
        return Fault.REPEATED_KEY
    if rows[first][2] in incomplete:
        rows[first] = (*rows[first][:2], Fault.SCATTERED)
    return Fault.SCATTERED


def label_at(source: ByteSource, start: int) -> str:
    """The key of the sample that begins at a byte, or the byte where no key can be read there."""
    try:
        key = split_name(next(iter_members(source.read, source.size, whole=False, start=start)).name)[0]
    except (TarError, StopIteration):
        key = ""
    return key or f"byte {start:,}"


def detail_of(source: ByteSource, start: int, stop: int, fault: Fault) -> str:
    """What else is known of a fault that a scan found in a row: where it lies, and the bytes that are lost."""
    if fault != Fault.SPARSE and not fault.is_of_shard:
        return ""
    try:
        for member in iter_members(source.read, source.size, whole=True, start=start):
            if fault == Fault.SPARSE and member.is_sparse:
                return f"{printable(member.name)} is a sparse member at byte {member.header}"
    except NoTarError as error:
        return str(error)
    except TrailingBytesError as error:
        return f"{stop - error.offset:,} bytes from byte {error.offset:,} on"
    except TarError as error:
        return f"{error}; {stop - start:,} bytes from byte {start:,} on are lost"
    return ""


def features(source: ByteSource, rows: np.ndarray, names: FeatureFields) -> np.ndarray:
    """(n,) FEATURES of the samples that `scan` found; zeros for those with a fault or an unreadable caption."""
    found = np.zeros(len(rows), dtype=FEATURES)
    found["score"] = np.nan
    for number, sample in iter_samples_of(source, rows):
        with suppress(SampleError):
            found[number] = _features(sample, names)
    return found


def iter_samples_of(source: ByteSource, rows: np.ndarray) -> Iterator[tuple[int, Sample]]:
    """(row, sample) of each row without a fault."""
    for number, (start, stop, fault) in enumerate(rows.tolist()):
        if not fault:
            yield number, parse_sample("", source.read(start, stop - start))


def _features(sample: Sample, names: FeatureFields) -> tuple[object, ...]:
    caption = sample.captions()[0]
    try:
        metadata = sample.metadata()
    except SampleError:
        metadata = {}
    height, width = size_of(sample.image)
    uid = metadata.get("uid")
    return (
        width,
        height,
        len(caption),
        hash64(sample.image),
        hash64(normalised_caption(caption)),
        _uid(uid) if isinstance(uid, str) else (0, 0),
        number_of(metadata.get(names.score)),
        str(metadata.get(names.language, "")).encode(errors="replace")[:16],  # JSON can hold half of a surrogate pair
    )


def _uid(text: str) -> tuple[int, int]:
    if not _UID.match(text):
        return 0, 0
    return int(text[:16], 16), int(text[16:32], 16)
