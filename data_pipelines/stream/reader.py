"""Reads single samples out of shards: one read for the whole of a sample, found by its byte range."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from data_pipelines.config import CacheConfig
from data_pipelines.errors import DataError, SampleError
from data_pipelines.shards.manifest import Manifest, Shard, check_size, save_array
from data_pipelines.shards.sample import Fault, Sample, parse_sample
from data_pipelines.shards.scan import scan
from data_pipelines.shards.tar import TarError, printable
from data_pipelines.storage.addresses import is_remote, shown
from data_pipelines.storage.cache import ShardCache
from data_pipelines.storage.files import open_bytes
from data_pipelines.storage.source import ByteSource
from data_pipelines.storage.wording import AGAIN

MAX_TRAINING_CAPTIONS = 2_000_000  # more do not change a tokenizer, and sentencepiece holds them in memory
MAX_OPEN_SHARDS = 256  # of a worker; a grain touches two or three, so reopening one costs little
REMOTE_READS = 16  # at the same time, where samples are read by range requests
_REINDEX = f"it has changed since it was indexed; {AGAIN}."


@dataclass(frozen=True)
class _Opened:
    source: ByteSource
    rows: np.ndarray  # (n, 3) int64: start, stop and Fault of each sample that is kept


class ShardReader:
    """Random access to the samples of a manifest's shards. Files are opened when first needed.

    Args:
        manifest: The shards.
        cache: Where remote shards are kept; without one, each sample is a range request.
        patience_s: How long a remote read is tried again.
    """

    def __init__(self, manifest: Manifest, cache: CacheConfig | None = None, patience_s: float = 300):
        self._manifest, self._cache_config, self._patience_s = manifest, cache, patience_s
        self._cache = ShardCache(cache.folder, int(cache.limit_gib * 2**30), patience_s) if cache else None
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return ShardReader, (self._manifest, self._cache_config, self._patience_s)  # open files stay in their process

    def read(self, shard: int, index: int) -> Sample:
        """The `index`-th of a shard's samples that are kept.

        Raises:
            SampleError: It has a fault, and whoever made the manifest did not look.
            DataError: The shard is missing, cannot be read, or is not what was indexed. Never skipped: it would
                change which samples a run sees.
        """
        opened = self._opened(shard)
        location = self._manifest.shards[shard].location
        start, stop, fault = opened.rows[index].tolist()
        fault = Fault(fault)
        if fault.is_of_shard:
            raise SampleError(fault.reason, f"byte {start:,}")
        data = opened.source.read(start, stop - start)
        if len(data) < stop - start:
            raise DataError(
                f"Shard {shown(location)} ends before byte {stop:,} where the index has a sample: {_REINDEX}"
            )
        try:
            sample = parse_sample(location, data)
            if fault:  # which the sample alone does not show
                raise SampleError(fault.reason, sample.key)
            return sample
        except TarError as error:
            reason = f"{error} of it"
        except SampleError as error:
            if fault:
                raise SampleError(fault.reason, error.key) from None
            reason = f"{printable(error.key)}: {error}"  # which the index would know
        raise DataError(f"Shard {shown(location)} from byte {start:,} holds no sample ({reason}): {_REINDEX}")

    def read_all(self, shards: Sequence[int], indices: Sequence[int]) -> list[Sample | SampleError]:
        """Several samples, with an error in the place of one that has a fault; remote ones at the same time."""

        def read(place: tuple[int, int]) -> Sample | SampleError:
            try:
                return self.read(*place)
            except SampleError as error:
                return error

        places = zip(shards, indices, strict=True)
        if self._cache or not any(is_remote(self._manifest.shards[shard].location) for shard in set(shards)):
            return [read(place) for place in places]
        for shard in set(shards):
            self._opened(shard)  # not in the threads, which would open it several times
        self._threads = self._threads or ThreadPoolExecutor(REMOTE_READS)
        return list(self._threads.map(read, places))

    @property
    def prefetches(self) -> bool:
        """Whether there is a cache to bring shards into."""
        return self._cache is not None

    def prefetch(self, shards: Iterable[int]) -> None:
        """Starts to bring remote shards into the cache, if there is one."""
        if self._cache:
            entries = (self._manifest.shards[shard] for shard in shards)
            remote = [entry for entry in entries if is_remote(entry.location)]
            self._cache.prefetch((entry.location, entry.bytes, entry.version, entry.sha256) for entry in remote)

    def close(self) -> None:
        """Closes every file."""
        for opened in self._open.values():
            opened.source.close()
        self._open.clear()

    def _opened(self, shard: int) -> _Opened:
        opened = self._open.get(shard)
        if opened is None:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].source.close()
            source = self._source(self._manifest.shards[shard])
            opened = self._open[shard] = _Opened(source, self._rows(shard, source))
        self._open.move_to_end(shard)
        return opened

    def _source(self, entry: Shard) -> ByteSource:
        if not is_remote(entry.location):
            check_size(entry)
            return open_bytes(entry.location, patience_s=self._patience_s)
        if self._cache:
            return self._cache.open(entry.location, entry.bytes, entry.version, entry.sha256)
        known = {"size": entry.bytes, "version": entry.version, "sha256": entry.sha256}
        return open_bytes(entry.location, patience_s=self._patience_s, **known)

    def _rows(self, shard: int, source: ByteSource) -> np.ndarray:
        entry, path = self._manifest.shards[shard], self._manifest.index_path(shard)
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            rows = np.empty(0)
        if not fits(rows, entry):
            if is_remote(entry.location) and not self._cache:
                raise DataError(
                    f"Shard {shown(entry.location)} is remote and not indexed, so that its samples cannot be found "
                    f"without reading all of it: set data.cache, or index it with `python -m data_pipelines index`."
                )
            rows = scan(source)
            if len(rows) != entry.indexed:
                raise DataError(
                    f"Shard {shown(entry.location)} holds {len(rows):,} samples but the manifest counts "
                    f"{entry.indexed:,}: {_REINDEX}"
                )
            with suppress(DataError):  # a folder that cannot be written to costs a scan each time
                save_array(path, rows)
        kept = self._manifest.kept(shard)
        return rows if kept is None else rows[kept]


def fits(rows: np.ndarray, entry: Shard) -> bool:
    """Whether an array can be the byte ranges of a shard's samples."""
    if rows.dtype != np.int64 or rows.shape != (entry.indexed, 3):
        return False
    edges = rows[:, :2].ravel()
    return len(edges) == 0 or (edges[0] >= 0 and edges[-1] <= entry.bytes and bool(np.all(np.diff(edges) >= 0)))


def iter_captions(
    manifest: Manifest, bad: Counter[str] | None = None, limit: int = MAX_TRAINING_CAPTIONS
) -> Iterator[str]:
    """Captions, all of them or `limit` spread evenly over the shards; bad ones are passed over.

    Args:
        manifest: Of the shards.
        bad: Gets the reasons why captions were passed over.
        limit: Captions to read, bad ones included.
    """
    reader = ShardReader(manifest)
    chosen = (
        place
        for number, place in enumerate(_places(manifest))
        if number * limit // manifest.samples < (number + 1) * limit // manifest.samples  # always, where all fit
    )
    try:
        while places := list(islice(chosen, 4 * REMOTE_READS)):
            for sample in reader.read_all(*zip(*places, strict=True)):
                try:
                    caption = sample.caption() if isinstance(sample, Sample) else sample
                except SampleError as error:
                    caption = error
                if isinstance(caption, str):
                    yield caption
                elif bad is not None:
                    bad[str(caption)] += 1
    finally:
        reader.close()


def _places(manifest: Manifest) -> Iterator[tuple[int, int]]:
    return ((shard, index) for shard, entry in enumerate(manifest.shards) for index in range(entry.samples))
