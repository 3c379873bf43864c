"""Held-out data: the whole split in its order, without augmentation, in equal batches for every rank.

What is evaluated is pairs: an image with five captions is five pairs, whether its shard holds them as a list or as
samples of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines.batch import BadSample, Batch, Record
from data_pipelines.errors import DataError, SampleError
from data_pipelines.samples.assemble import Assembler, collate
from data_pipelines.samples.columns import BatchSpec, Pair, Row, open_columns
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Sample
from data_pipelines.shards.tar import printable
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.wording import INDEX_AGAIN
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.workers import BatchDataset, stream

_EXAMINED_AT_ONCE = 64  # samples

Examined = list[tuple[int, ...] | BadSample]  # of each sample, which of its captions can be used


class HeldoutData:
    """The held-out shards.

    Args:
        spec: Which shards, how they are read, and what batches hold. A pair's mask depends on the seed and on the
            pair's index, so it is the same each time.

    Raises:
        DataError: A file is missing or not what it should be.
    """

    def __init__(self, spec: BatchSpec):
        config = spec.config
        if config.heldout is None:
            raise DataError("There is nothing to evaluate on: set data.heldout to the manifest of held-out shards.")
        self._workers = config.workers
        self.tokenizer, self._text_length = spec.tokenizer, spec.text_length
        self.manifest = Manifest.load(config.heldout)
        self.bad: tuple[BadSample, ...] = ()  # what `examine` found
        self._split = _Split(
            ShardReader(self.manifest, config.cache, config.patience_s),
            self.manifest,
            Assembler(open_columns(spec, training=False)),
        )
        # (pairs, 2) int64: sample and caption. Until the split is examined, each sample with its first caption.
        self._pairs = np.stack([np.arange(self.manifest.samples), np.zeros(self.manifest.samples, np.int64)], axis=1)

    def __len__(self) -> int:
        return len(self._pairs)

    def examine(
        self,
        rank: int = 0,
        ranks: int = 1,
        gather: Callable[[Examined], list[Examined]] = lambda examined: [examined],
    ) -> None:
        """Looks at every sample, each rank at its share: all captions become pairs, and what is bad is left out.

        Args:
            rank: Place among those who share the work.
            ranks: Number of them.
            gather: Gives every rank's share to all, in the order of ranks.

        Raises:
            DataError: A shard cannot be read, or not one sample can be used.
        """
        chunks = range(-(-self.manifest.samples // _EXAMINED_AT_ONCE))
        share = [
            verdict
            for found in stream(_Examination(self._split), chunks[rank::ranks], self._workers)
            for verdict in found
        ]
        shares = [iter(part) for part in gather(share)]
        pairs: list[tuple[int, int]] = []
        bad: list[BadSample] = []
        for sample in range(self.manifest.samples):
            verdict = next(shares[sample // _EXAMINED_AT_ONCE % ranks])
            if isinstance(verdict, BadSample):
                bad.append(verdict)
            else:
                pairs += [(sample, caption) for caption in verdict]
        if not pairs:
            first = f"; the first is {_named(bad[0])}" if bad else ""
            raise DataError(f"None of the {len(bad):,} held-out samples of {self.manifest.path} can be used{first}.")
        self._pairs, self.bad = np.array(pairs, dtype=np.int64), tuple(bad)

    def complaint(self) -> str:
        """What `examine` found to be bad, in one sentence; empty if nothing."""
        if not self.bad:
            return ""
        return (
            f"{len(self.bad):,} of {self.manifest.samples:,} held-out samples cannot be used and are left out; the "
            f"first is {_named(self.bad[0])}."
        )

    def encode(self, caption: str) -> np.ndarray:
        """(L,) int64 ids of a caption that is no part of the split, as a prompt is."""
        return self.tokenizer.encode(caption, self._text_length)[0]

    def batches(self, batch_size: int, *, dp_rank: int = 0, dp_size: int = 1, records: bool = False) -> Iterator[Batch]:
        """The split once, in ceil(pairs / (batch_size x dp_size)) batches on every rank.

        The last ones wrap around to the beginning: `positions` are indices into the pairs, and a pair met
        before is told by its position.

        Args:
            batch_size: Pairs of a batch of one rank.
            dp_rank: Place among the data-parallel ranks.
            dp_size: Number of data-parallel ranks.
            records: Fill `Batch.records` with keys, captions and metadata.

        Raises:
            DataError: A sample cannot be used. None is replaced: a metric must mean the same each time.
        """
        num_batches = -(-len(self) // (batch_size * dp_size))
        dataset = _HeldoutBatches(self._split, self._pairs, batch_size, records)
        return stream(dataset, range(dp_rank, num_batches * dp_size, dp_size), self._workers)


class _Split:
    """The samples of all shards, by their number."""

    def __init__(self, reader: ShardReader, manifest: Manifest, assembler: Assembler):
        self._reader, self._manifest, self.assembler = reader, manifest, assembler
        self._stops = np.cumsum([shard.samples for shard in manifest.shards])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def read(self, numbers: Sequence[int]) -> list[Sample | SampleError]:
        shards = np.searchsorted(self._stops, numbers, side="right")
        firsts = np.concatenate([[0], self._stops])[shards]
        return self._reader.read_all(shards.tolist(), (np.asarray(numbers) - firsts).tolist())

    def bad(self, number: int, sample: Sample | SampleError, error: SampleError) -> BadSample:
        shard = int(np.searchsorted(self._stops, number, side="right"))
        return BadSample(shown(self._manifest.shards[shard].location), sample.key, str(error))


class _Examination(BatchDataset[Examined]):
    """What can be used of some samples, keyed by the number of the chunk."""

    def __init__(self, split: _Split):
        self._split = split

    def make(self, key: int) -> Examined:
        chunk = range(key * _EXAMINED_AT_ONCE, min((key + 1) * _EXAMINED_AT_ONCE, len(self._split)))
        return [self._examine(*found) for found in zip(chunk, self._split.read(chunk), strict=True)]

    def _examine(self, number: int, sample: Sample | SampleError) -> tuple[int, ...] | BadSample:
        try:
            if isinstance(sample, SampleError):
                raise sample
            return self._split.assembler.usable_captions(sample, number)
        except SampleError as error:
            return self._split.bad(number, sample, error)


class _HeldoutBatches(BatchDataset[Batch]):
    """The pairs cut into batches, keyed by their number."""

    def __init__(self, split: _Split, pairs: np.ndarray, batch_size: int, records: bool):
        self._split, self._pairs, self._batch_size, self._records = split, pairs, batch_size, records

    def make(self, key: int) -> Batch:
        positions = [place % len(self._pairs) for place in range(key * self._batch_size, (key + 1) * self._batch_size)]
        numbers, captions = self._pairs[positions].T.tolist()
        samples = self._split.read(numbers)
        pairs = [_pair(*chosen) for chosen in zip(samples, captions, positions, strict=True)]
        rows: list[Row] = []
        for number, sample, row in zip(numbers, samples, self._split.assembler.rows(pairs), strict=True):
            if isinstance(row, SampleError):
                raise DataError(
                    f"Held-out {_named(self._split.bad(number, sample, row))}. Mend it or take it out, then "
                    f"{INDEX_AGAIN}."
                )
            rows.append(row)
        return collate(rows, records=[_record(pair) for pair in pairs if isinstance(pair, Pair) and self._records])


def _pair(sample: Sample | SampleError, caption: int, position: int) -> Pair | SampleError:
    try:
        return sample if isinstance(sample, SampleError) else Pair(sample, sample.captions()[caption], position)
    except SampleError as error:
        return error


def _record(pair: Pair) -> Record:
    try:
        metadata = pair.sample.metadata()
    except SampleError:  # it has a caption all the same
        metadata = {}
    return Record(pair.sample.key, pair.caption, metadata)


def _named(bad: BadSample) -> str:
    return f"sample {printable(bad.key)} in shard {bad.shard}: {bad.reason}"
