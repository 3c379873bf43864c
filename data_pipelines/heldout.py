"""Held-out data: the whole split in its order, without augmentation, in equal batches for every rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipelines.assemble import Assembler, Row, collate
from data_pipelines.batch import Batch, Record
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, SampleError
from data_pipelines.manifest import Manifest
from data_pipelines.reader import ShardReader
from data_pipelines.storage import shown
from data_pipelines.tar import printable
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.workers import BatchDataset, stream


class HeldoutData:
    """The held-out shards.

    Args:
        config: Which shards, and how they are read.
        image_size: Side of the images in pixels.
        text_length: Tokens of a caption (L).
        mask_probability: Share of the pieces hidden for masked language modelling.
        seed: Of the run; each sample's mask depends on it and on the sample's index, so it is the same each time.

    Raises:
        DataError: A file is missing or not what it should be.
    """

    def __init__(self, config: DataConfig, *, image_size: int, text_length: int, mask_probability: float, seed: int):
        if config.heldout is None:
            raise DataError("There is nothing to evaluate on: set data.heldout to the manifest of held-out shards.")
        self._workers = config.workers
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self.manifest = Manifest.load(config.heldout)
        self._reader = ShardReader(self.manifest, config.cache, config.patience_s)
        self._assembler = Assembler(
            self.tokenizer, image_size, text_length, mask_probability, seed, config.exif_orientation
        )

    def __len__(self) -> int:
        return self.manifest.samples

    def batches(self, batch_size: int, *, dp_rank: int = 0, dp_size: int = 1, records: bool = False) -> Iterator[Batch]:
        """The split once, in ceil(samples / (batch_size x dp_size)) batches on every rank.

        The last ones wrap around to the beginning: `positions` are indices into the split, and a sample met
        before is told by its position.

        Args:
            batch_size: Samples of a batch of one rank.
            dp_rank: Place among the data-parallel ranks.
            dp_size: Number of data-parallel ranks.
            records: Fill `Batch.records` with keys, captions and metadata.

        Raises:
            DataError: A sample cannot be used. None is replaced: a metric must mean the same each time.
        """
        num_batches = -(-len(self) // (batch_size * dp_size))
        dataset = _HeldoutBatches(self._reader, self.manifest, self._assembler, batch_size, records)
        return stream(dataset, range(dp_rank, num_batches * dp_size, dp_size), self._workers)


class _HeldoutBatches(BatchDataset):
    """The split cut into batches, keyed by their number."""

    def __init__(self, reader: ShardReader, manifest: Manifest, assembler: Assembler, batch_size: int, records: bool):
        self._reader, self._manifest, self._assembler = reader, manifest, assembler
        self._batch_size, self._records = batch_size, records
        self._stops = np.cumsum([shard.samples for shard in manifest.shards])

    def make(self, key: int) -> Batch:
        rows: list[Row] = []
        records: list[Record] = []
        for place in range(key * self._batch_size, (key + 1) * self._batch_size):
            position = place % int(self._stops[-1])
            shard = int(np.searchsorted(self._stops, position, side="right"))
            first = int(self._stops[shard - 1]) if shard else 0
            name = ""
            try:
                sample = self._reader.read(shard, position - first)
                name = sample.key
                rows.append(self._assembler.row(sample, position))
                if self._records:
                    records.append(Record(sample.key, sample.caption(), sample.metadata()))
            except SampleError as error:
                raise DataError(
                    f"Held-out sample {printable(name or error.key)} in shard "
                    f"{shown(self._manifest.shards[shard].location)} cannot be used: {error}. Mend it or "
                    f"take it out, then run `python -m data_pipelines index` again."
                ) from None
        return collate(rows, records=records)
