"""Training data: an endless stream of micro-batches from any point of the run, the same on any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.assemble import Assembler, collate
from data_pipelines.augment import Augmentation
from data_pipelines.batch import BadSample, Batch
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, SampleError
from data_pipelines.manifest import Manifest
from data_pipelines.order import DataState, Order, Steps
from data_pipelines.reader import ShardReader
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.workers import BatchDataset, stream


class TrainingData:
    """The training shards as one data-parallel rank sees them.

    Args:
        config: Which shards, and how they are read.
        image_size: Side of the images in pixels.
        text_length: Tokens of a caption (L).
        mask_probability: Share of the pieces hidden for masked language modelling.
        seed: Of the run.
        global_batch: Samples of an optimizer step, over all ranks and micro-steps.
        accumulation: Micro-steps of an optimizer step.
        dp_rank: Place among the data-parallel ranks; ranks that differ only in tp or pp pass the same.
        dp_size: Number of data-parallel ranks.

    Raises:
        DataError: A file is missing or not what it should be, or the numbers do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        text_length: int,
        mask_probability: float,
        seed: int,
        global_batch: int,
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        share = dp_size * accumulation * config.grain
        if global_batch < 1 or global_batch % share:
            below = global_batch // share * share
            nearest = f"{below:,} or {below + share:,}" if below else f"{share:,}"
            raise DataError(
                f"global_batch {global_batch:,} does not divide into whole grains: {dp_size} data-parallel ranks x "
                f"accumulation {accumulation} x data.grain {config.grain} = {share:,} must divide it; "
                f"use {nearest}, or a smaller data.grain."
            )
        self._config = config
        self.tokenizer = Tokenizer.load(config.tokenizer)
        self.manifest = Manifest.load(config.train)
        self.order = Order(
            [shard.samples for shard in self.manifest.shards],
            seed=seed,
            grain=config.grain,
            lanes=config.lanes,
            window=config.window,
        )
        self.micro_batch_per_rank = global_batch // (dp_size * accumulation)
        self._steps = Steps(self.order.grains_per_epoch, global_batch // config.grain, accumulation)
        augmentation = Augmentation(config.crop_scale, config.flip, config.augment, seed)
        assembler = Assembler(self.tokenizer, image_size, text_length, mask_probability, seed, augmentation)
        grains = self.micro_batch_per_rank // config.grain
        self._dataset = _TrainingBatches(ShardReader(self.manifest), self.order, assembler, grains, dp_rank, dp_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, known beforehand."""
        return self._steps.per_epoch

    def initial_state(self) -> DataState:
        """The beginning of a run with this order of the data."""
        order = self.order
        return DataState(0, 0, self.manifest.hash, order.seed, order.grain, order.lanes, order.window)

    def advance(self, state: DataState) -> DataState:
        """The state one optimizer step later."""
        epoch, first = self._steps.place(state.epoch, state.grains, 0)
        return replace(state, epoch=epoch, grains=first + self._steps.grains_per_step)

    def batches(self, state: DataState) -> Iterator[Batch]:
        """This rank's micro-batches from `state` on, without end; `accumulation` of them make a step.

        Raises:
            DataError: `state` belongs to another order of the data, or a shard cannot be read.
        """
        state.check_resumable(self.initial_state())
        return stream(self._dataset, _Places(self._steps, state), self._config.workers)


@dataclass(frozen=True)
class _Places:
    """(epoch, first grain) of each micro-step from a state on, as a sampler."""

    steps: Steps
    state: DataState

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.steps.micro_steps(self.state.epoch, self.state.grains)


class _TrainingBatches(BatchDataset):
    """One rank's micro-batch of each micro-step, keyed by (epoch, first grain)."""

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        assembler: Assembler,
        grains: int,
        dp_rank: int,
        dp_size: int,
    ):
        self._reader, self._order, self._assembler = reader, order, assembler
        self._grains, self._dp_rank, self._dp_size = grains, dp_rank, dp_size

    def make(self, key: tuple[int, int]) -> Batch:
        epoch, first = key
        rows: list[dict[str, Any]] = []
        bad: list[BadSample] = []
        for grain in range(first + self._dp_rank, first + self._grains * self._dp_size, self._dp_size):
            shards, indices = self._order.locate(epoch, grain)
            position = self._order.position(epoch, grain)
            for item, place in enumerate(zip(shards.tolist(), indices.tolist(), strict=True)):
                row = self._row(place, position + item, bad)
                rows.append(row or self._replacement(epoch, grain, item, position + item, bad[-1]))
        return collate(rows, bad)

    def _row(self, place: tuple[int, int], position: int, bad: list[BadSample]) -> dict[str, Any] | None:
        sample = self._reader.read(*place)
        try:
            return self._assembler.arrays(sample, position)
        except SampleError as error:
            bad.append(BadSample(sample.shard, sample.key, str(error)))
            return None

    def _replacement(self, epoch: int, grain: int, item: int, position: int, bad: BadSample) -> dict[str, Any]:
        # Further bad samples on the way are not reported here: each is when its own turn comes.
        places: Iterable[tuple[int, int]] = self._order.replacements(epoch, grain, item)
        for place in places:
            if row := self._row(place, position, []):
                return row
        raise DataError(
            f"No sample of a whole window of {self._order.window:,} can be used; one is {bad.key} in shard "
            f"{bad.shard}: {bad.reason}. Check how these shards were made."
        )
