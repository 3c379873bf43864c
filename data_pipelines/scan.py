"""One pass over a shard: where its samples are, what is wrong with them and, if asked, what they are like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import SampleError
from data_pipelines.header import size_of
from data_pipelines.sample import Fault, Sample, fault_of, hash64, normalised_caption, parse_sample
from data_pipelines.storage import ByteSource
from data_pipelines.tar import TarError, iter_members, iter_samples, split_name
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

    Never fails on what the bytes are: whatever follows the last whole sample of a damaged tar is one row, DAMAGED.
    """
    rows: list[tuple[int, int, int]] = []
    keys: set[str] = set()
    try:
        for sample in iter_samples(iter_members(source.read, source.size, whole=True)):
            fault = Fault.REPEATED_KEY if sample.key in keys else fault_of(sample, source.read)
            keys.add(sample.key)
            rows.append((sample.start, sample.stop, fault))
    except TarError:
        start = rows[-1][1] if rows else 0
        rows.append((start, max(source.size, start), Fault.DAMAGED))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def key_at(source: ByteSource, start: int) -> str:
    """The key of the sample that begins at a byte, for reports; empty in damage."""

    def read(offset: int, size: int) -> bytes:
        return source.read(start + offset, size)

    try:
        return split_name(next(iter_members(read, source.size - start, whole=False)).name)[0]
    except (TarError, StopIteration):
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
        str(metadata.get(names.language, "")).encode(errors="replace")[:16],  # JSON can spell half a letter
    )


def _uid(text: str) -> tuple[int, int]:
    if not _UID.match(text):
        return 0, 0
    return int(text[:16], 16), int(text[16:32], 16)
