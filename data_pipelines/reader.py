"""Reads single samples out of shards: one pread for the whole of a sample, found by its byte range."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from data_pipelines.errors import DataError, SampleError, cannot_open
from data_pipelines.index import IMAGE_EXTENSIONS, index_path, scan_shard
from data_pipelines.manifest import Manifest, Shard, check_size
from data_pipelines.tar import Member, TarError, iter_members, iter_samples

MAX_CAPTION_BYTES = 64 * 1024
MAX_TRAINING_CAPTIONS = 2_000_000  # more do not change a tokenizer, and sentencepiece holds them in memory
MAX_OPEN_SHARDS = 256  # of a worker; a grain touches two or three, so reopening one costs little
_REINDEX = "it has changed since it was indexed; restore it, or run `python -m data_pipelines index` again."


@dataclass(frozen=True)
class Sample:
    """An image-text pair as it lies in a shard."""

    shard: str
    key: str
    image: bytes
    text: bytes | None  # of .txt
    json: bytes | None

    def caption(self) -> str:
        """The caption without white space around it.

        Raises:
            SampleError: It is empty, too long or not UTF-8.
        """
        raw = self.text
        if raw is None:
            caption = self.metadata().get("caption")
            raw = caption.encode(errors="replace") if isinstance(caption, str) else b""
        if len(raw) > MAX_CAPTION_BYTES:
            raise SampleError(f"caption of {len(raw):,} bytes is longer than {MAX_CAPTION_BYTES:,}")
        try:
            text = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise SampleError("caption is not UTF-8") from None
        if not text:
            raise SampleError("caption is empty")
        return text

    def metadata(self) -> dict[str, object]:
        """The fields of .json, none where there is no such member.

        Raises:
            SampleError: It is not a JSON object.
        """
        if self.json is None:
            return {}
        try:
            content = json.loads(self.json)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise SampleError("json is not an object")
        return content


class ShardReader:
    """Random access to the samples of a manifest's shards. Files are opened when first needed."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # shard -> descriptor, byte ranges

    def __reduce__(self) -> tuple[object, ...]:
        return ShardReader, (self._manifest,)  # open files stay in their process

    def read(self, shard: int, index: int) -> Sample:
        """The `index`-th usable sample of a shard.

        Raises:
            DataError: The shard is missing, cannot be read, or is not what was indexed. Never skipped: it would
                change which samples a run sees.
        """
        descriptor, ranges = self._opened(shard)
        path = self._manifest.shards[shard].path
        start, stop = ranges[index].tolist()
        try:
            data = os.pread(descriptor, stop - start, start)
        except OSError as error:
            raise DataError(f"Shard {path} cannot be read at byte {start:,}: {error.strerror}.") from None
        if len(data) < stop - start:
            raise DataError(f"Shard {path} ends before byte {stop:,} where the index has a sample: {_REINDEX}")
        try:
            members = iter_members(lambda at, size: data[at : at + size], len(data), whole=False)
            samples = list(iter_samples(members))
        except TarError as error:
            raise DataError(f"Shard {path} from byte {start:,} holds no sample ({error} of it): {_REINDEX}") from None
        if len(samples) != 1:
            raise DataError(f"Shard {path} from byte {start:,} holds {len(samples)} samples, not 1: {_REINDEX}")
        found = samples[0]

        def content(member: Member | None) -> bytes | None:
            return None if member is None else data[member.start : member.start + member.size]

        image = next((content(found.members.get(name)) for name in IMAGE_EXTENSIONS if name in found.members), None)
        text, metadata = content(found.members.get("txt")), content(found.members.get("json"))
        if image is None or (text is None and metadata is None):
            raise DataError(f"Shard {path} has no image and caption at key {found.key}: {_REINDEX}")
        return Sample(str(path), found.key, image, text, metadata)

    def close(self) -> None:
        """Closes every file."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _opened(self, shard: int) -> tuple[int, np.ndarray]:
        opened = self._open.get(shard)
        if opened is None:
            if len(self._open) == MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
            entry = self._manifest.shards[shard]
            check_size(entry)
            ranges = byte_ranges(entry)
            try:
                opened = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC), ranges
            except OSError as error:
                raise cannot_open(f"Shard {entry.path}", error) from None
            self._open[shard] = opened
        self._open.move_to_end(shard)
        return opened


def byte_ranges(shard: Shard) -> np.ndarray:
    """[start, stop) of each usable sample, (n, 2) int64: from the index beside the shard, else by a scan.

    Raises:
        DataError: The shard does not hold the samples that the manifest counts.
    """
    path = index_path(shard.path)
    if path.is_file():
        try:
            ranges = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            ranges = np.empty(0)
        if _fits(ranges, shard):
            return ranges
    ranges, _ = scan_shard(shard.path)
    if len(ranges) != shard.samples:
        raise DataError(
            f"Shard {shard.path} holds {len(ranges):,} usable samples but the manifest counts {shard.samples:,}: "
            f"{_REINDEX}"
        )
    return ranges


def _fits(ranges: np.ndarray, shard: Shard) -> bool:
    if ranges.dtype != np.int64 or ranges.shape != (shard.samples, 2):
        return False
    edges = ranges.ravel()
    return len(edges) == 0 or (edges[0] >= 0 and edges[-1] <= shard.bytes and bool(np.all(np.diff(edges) >= 0)))


def iter_captions(manifest: Manifest) -> Iterator[str]:
    """The captions of all shards in their order, at most MAX_TRAINING_CAPTIONS; bad ones are passed over."""
    reader = ShardReader(manifest)
    places = ((shard, index) for shard, entry in enumerate(manifest.shards) for index in range(entry.samples))
    try:
        for place in islice(places, MAX_TRAINING_CAPTIONS):
            with suppress(SampleError):
                yield reader.read(*place).caption()
    finally:
        reader.close()
