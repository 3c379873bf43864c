"""Training data: an endless stream of micro-batches from any point of the run, the same on any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.batch import BadSample, Batch
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.errors import DataError, SampleError, named
from data_pipelines.order.mixture import DataState, LeftOut, Segment, SourceIdentity, integer_shares
from data_pipelines.order.order import Order
from data_pipelines.randomness import Purpose, raw
from data_pipelines.samples.assemble import Assembler, collate, draw_pair
from data_pipelines.samples.columns import BatchSpec, Row, open_columns
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.tar import printable
from data_pipelines.storage.addresses import shown
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.workers import BatchDataset, stream

PREFETCHED_MICRO_STEPS = 32  # how far ahead remote shards are brought into the cache


class TrainingData:
    """The sources of a run as one data-parallel rank sees them.

    Args:
        spec: Which shards, how they are read, and what batches hold.
        global_batch: Samples of an optimizer step, over all ranks and micro-steps.
        accumulation: Micro-steps of an optimizer step.
        dp_rank: Place among the data-parallel ranks; ranks that differ only in tp or pp pass the same.
        dp_size: Number of data-parallel ranks.

    Raises:
        DataError: A file is missing or not what it should be, or the numbers do not divide.
    """

    def __init__(
        self,
        spec: BatchSpec,
        *,
        global_batch: int,
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        config, seed = spec.config, spec.seed
        if misfit := config.misfit(global_batch, accumulation, dp_size):
            raise DataError(misfit)
        self._config = config
        self.tokenizer = spec.tokenizer
        self.sources = _open_sources(config, seed)
        changes = (source.config.weight for source in self.sources if isinstance(source.config.weight, dict))
        for step in sorted({0}.union(*changes)):
            self._shares(step)  # an error is raised now, not at that step
        self._seed = seed
        self._grains_per_step = global_batch // config.grain
        self._accumulation = accumulation
        self.micro_batch_per_rank = global_batch // (dp_size * accumulation)
        assembler = Assembler(open_columns(spec, training=True))
        grains = range(dp_rank, self._grains_per_step // accumulation, dp_size)
        self._dataset = _TrainingBatches(self.sources, assembler, seed, grains, self._grains_per_step // accumulation)

    def initial_state(self) -> DataState:
        """The beginning of a run with these sources."""
        none = (0,) * len(self.sources)
        return DataState(
            step=0,
            grains=0,
            seed=self._seed,
            grain=self._config.grain,
            sources={
                source.name: SourceIdentity(
                    manifest=source.manifest.hash, lanes=source.order.lanes, window=source.order.window
                )
                for source in self.sources
            },
            segment=Segment(self._seed, 0, none, self._shares(0)),
        )

    def resumed(self, saved: DataState) -> DataState:
        """The state that goes on from `saved` with the present sources and weights.

        Raises:
            DataError: `saved` belongs to another order of the data.
        """
        fresh = self.initial_state()
        saved.check_resumable(fresh)
        if list(saved.sources) != list(fresh.sources):  # sources were added: the others keep what they have given
            given = dict(zip(saved.sources, saved.segment.taken_before(saved.grains), strict=True))
            taken = tuple(given.get(name, 0) for name in fresh.sources)
            segment = Segment(self._seed, saved.grains, taken, self._shares(saved.step))
            return saved.model_copy(update={"sources": fresh.sources, "segment": segment})
        return self._with_shares_of_its_step(saved)

    def advance(self, state: DataState) -> DataState:
        """The state one optimizer step later."""
        grains = state.grains + self._grains_per_step
        return self._behind_what_is_left_out(state.model_copy(update={"step": state.step + 1, "grains": grains}))

    def leave_out(self, state: DataState, spans: Sequence[LeftOut]) -> DataState:
        """The same state in a run that leaves out these spans, and no others."""
        return self._behind_what_is_left_out(state.model_copy(update={"left_out": tuple(spans)}))

    def span(self, start: DataState, stop: DataState) -> LeftOut:
        """What lies between two states."""
        taken = dict(zip(stop.sources, stop.segment.taken_before(stop.grains), strict=True))
        return LeftOut(start=start.grains, stop=stop.grains, taken=taken)

    def epochs(self, state: DataState) -> dict[str, float]:
        """How often each source has been read."""
        taken = state.segment.taken_before(state.grains)
        return {
            source.name: grains / source.order.grains_per_epoch
            for source, grains in zip(self.sources, taken, strict=True)
        }

    def shares(self, step: int) -> tuple[float, ...]:
        """Each source's share of the samples of a step, in the order of `sources`."""
        shares = self._shares(step)
        return tuple(share / sum(shares) for share in shares)

    def batches(self, state: DataState) -> Iterator[Batch]:
        """This rank's micro-batches from `state` on, without end; `accumulation` of them make a step.

        Raises:
            DataError: A shard cannot be read.
        """
        return stream(self._dataset, _Places(self, state), self._config.workers)

    def micro_steps(self, state: DataState) -> Iterator[tuple[Segment, int]]:
        """(segment, first grain) of every micro-step from a state on, without end."""
        micro = self._grains_per_step // self._accumulation
        while True:
            for number in range(self._accumulation):
                yield state.segment, state.grains + number * micro
            state = self.advance(state)

    def _shares(self, step: int) -> tuple[int, ...]:
        try:
            return integer_shares([source.weight_at(step) for source in self.sources])
        except ValueError:
            raise DataError(
                f"At step {step:,} every source of data.train has the weight 0: give one of them more."
            ) from None

    def _behind_what_is_left_out(self, state: DataState) -> DataState:
        for span in sorted(state.left_out, key=lambda span: span.start):  # one may end where the next begins
            if span.start <= state.grains < span.stop:
                here = dict(zip(state.sources, state.segment.taken_before(state.grains), strict=True))
                taken = tuple((here | span.taken)[name] for name in state.sources)
                segment = Segment(self._seed, span.stop, taken, self._shares(state.step))
                state = state.model_copy(update={"grains": span.stop, "segment": segment})
        return self._with_shares_of_its_step(state)

    def _with_shares_of_its_step(self, state: DataState) -> DataState:
        shares = self._shares(state.step)
        if shares == state.segment.shares:
            return state
        taken = state.segment.taken_before(state.grains)
        return state.model_copy(update={"segment": Segment(self._seed, state.grains, taken, shares)})


@dataclass(frozen=True)
class Source:
    """One source of the mixture."""

    name: str
    config: SourceConfig
    manifest: Manifest
    order: Order
    reader: ShardReader

    def weight_at(self, step: int) -> float:
        """Relative to the other sources' weights."""
        if self.config.epochs is not None:
            return self.config.epochs * self.order.grains_per_epoch
        weight = self.config.weight
        if isinstance(weight, dict):
            return weight[max(begin for begin in weight if begin <= step)]
        return 1.0 if weight is None else weight


def _open_sources(config: DataConfig, seed: int) -> tuple[Source, ...]:
    given = {"train": SourceConfig(manifest=config.train)} if isinstance(config.train, Path) else config.train
    sources: list[Source] = []
    for name, source in sorted(given.items()):  # so that the order of lines in the YAML changes nothing
        with named("data.train" if isinstance(config.train, Path) else f"data.train.{name}.manifest"):
            manifest = Manifest.load(source.manifest)
        try:
            order = Order(
                [shard.samples for shard in manifest.shards],
                seed=_seed_of(seed, name),
                grain=config.grain,
                lanes=config.lanes,
                window=config.window,
            )
        except DataError as error:
            raise DataError(f"{source.manifest}: {error}") from None
        reader = ShardReader(manifest, config.cache, config.patience_s)
        sources.append(Source(name, source, manifest, order, reader))
    return tuple(sources)


def _seed_of(seed: int, name: str) -> int:
    # By name, so that a source keeps its order whatever is mixed with it.
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return int(raw(seed, Purpose.SOURCE, word, size=1)[0])


@dataclass(frozen=True)
class _Places:
    """The micro-steps from a state on, as a sampler."""

    data: TrainingData
    state: DataState

    def __iter__(self) -> Iterator[tuple[Segment, int]]:
        return self.data.micro_steps(self.state)


class _TrainingBatches(BatchDataset):
    """One rank's micro-batch of each micro-step, keyed by (segment, first grain)."""

    def __init__(
        self,
        sources: tuple[Source, ...],
        assembler: Assembler,
        seed: int,
        grains: range,
        grains_per_micro_step: int,
    ):
        self._sources, self._assembler, self._seed = sources, assembler, seed
        self._grains = grains  # of a micro-step, those of this rank
        self._ahead = PREFETCHED_MICRO_STEPS * grains_per_micro_step
        self._asked = 0  # grains before this one have been asked for

    def make(self, key: tuple[Segment, int]) -> Batch:
        segment, first = key
        rows: list[Row] = []
        bad: list[BadSample] = []
        self._prefetch(segment, first)
        for grain in range(first + self._grains.start, first + self._grains.stop, self._grains.step):
            rows += self._rows(segment, grain, bad)
        return collate(rows, bad)

    def _rows(self, segment: Segment, grain: int, bad: list[BadSample]) -> Iterator[Row]:
        """The samples of a grain, each with a replacement if it cannot be used."""
        source, epoch, number = self._locate(segment, grain)
        shards, indices = source.order.locate(epoch, number)
        samples = source.reader.read_all(shards.tolist(), indices.tolist())
        first = grain * source.order.grain
        pairs = [draw_pair(sample, first + item, self._seed) for item, sample in enumerate(samples)]
        rows = self._assembler.rows(pairs)
        for item, (shard, sample, row) in enumerate(zip(shards.tolist(), samples, rows, strict=True)):
            if isinstance(row, SampleError):
                bad.append(BadSample(shown(source.manifest.shards[shard].location), sample.key, str(row)))
                row = self._replacement(source, epoch, number, item, first + item, bad[-1])
            yield row

    def _replacement(self, source: Source, epoch: int, number: int, item: int, position: int, bad: BadSample) -> Row:
        # Further bad samples on the way are reported when their own turn comes.
        for place in source.order.replacements(epoch, number, item):
            with suppress(SampleError):
                return self._assembler.row(draw_pair(source.reader.read(*place), position, self._seed))
        raise DataError(
            f"No sample of a whole window of {source.order.window:,} can be used; one is {printable(bad.key)} in shard "
            f"{bad.shard}: {bad.reason}. Check how these shards were made."
        )

    def _locate(self, segment: Segment, grain: int) -> tuple[Source, int, int]:
        place, number = segment.place(grain)
        source = self._sources[place]
        return source, *divmod(number, source.order.grains_per_epoch)

    def _prefetch(self, segment: Segment, first: int) -> None:
        # In the order of use, this micro-step's own included; what an earlier call asked for is not asked again.
        stop = first + self._ahead
        start = self._asked if first < self._asked <= stop else first
        for grain in range(start + self._grains.start, stop, self._grains.step):
            source, epoch, number = self._locate(segment, grain)
            if source.reader.prefetches:
                source.reader.prefetch(np.unique(source.order.locate(epoch, number)[0]).tolist())
        self._asked = stop
