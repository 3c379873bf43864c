"""The order of the data as a pure function of (seed, epoch, shard sizes): canonical lanes.

An epoch permutes the shards, lays their samples end to end and cuts them into L equal lanes. Each lane is shuffled
window by window. The unit is a grain of m samples; grain g of an epoch is item g div L of lane g mod L, so a
global batch draws from all lanes at once. Nothing here depends on ranks, workers or history: where a run stands
is a few numbers, and resuming is computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.randomness import Purpose, permutation

MAX_LANES = 960  # highly composite: most numbers of ranks and workers divide it
MAX_LOSS = 100  # lanes may cost at most 1/100 of an epoch


def default_lanes(samples: int, grain: int) -> int:
    """The most lanes, of 960 and its divisors, that lose at most 1 % of an epoch to rounding."""
    divisors = (lanes for lanes in range(MAX_LANES, 0, -1) if MAX_LANES % lanes == 0)
    return next((lanes for lanes in divisors if lanes * grain * MAX_LOSS <= samples), 1)


class Order:
    """Where every sample of every epoch stands.

    Args:
        shard_sizes: Samples of each shard, in the manifest's order.
        seed: Of the run.
        grain: Samples that always travel together (m).
        lanes: Parallel lanes (L); None picks `default_lanes`.
        window: Samples of a lane that are shuffled among themselves.

    Raises:
        DataError: There are fewer samples than one grain a lane.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, grain: int, lanes: int | None, window: int):
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        samples = int(self._sizes.sum())
        self.seed, self.grain, self.window = seed, grain, window
        self.lanes = lanes or default_lanes(samples, grain)
        self.lane_samples = samples // (self.lanes * grain) * grain
        if self.lane_samples == 0:
            raise DataError(
                f"{samples:,} samples are too few for {self.lanes} lanes of at least one grain of {grain}: "
                f"lower data.grain or data.lanes, or add data."
            )
        self._windows: dict[int, tuple[int, int, np.ndarray]] = {}  # lane -> epoch, window and its permutation
        self._epoch_plan = lru_cache(maxsize=2)(self._make_epoch_plan)

    def __reduce__(self) -> tuple[object, ...]:
        return _make_order, (self._sizes, self.seed, self.grain, self.lanes, self.window)

    @property
    def grains_per_epoch(self) -> int:
        """The rest of the samples, fewer than lanes x grain and other ones each epoch, are left out."""
        return self.lanes * self.lane_samples // self.grain

    def position(self, epoch: int, grain: int) -> int:
        """Global position of a grain's first sample: unique over the run, the key of all its randomness."""
        return (epoch * self.grains_per_epoch + grain) * self.grain

    def locate(self, epoch: int, grain: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index in the shard) of a grain's samples, two (m,) int64 arrays."""
        lane, first = self._lane_and_first(grain)
        stop = first + self.grain
        parts: list[np.ndarray] = []
        while first < stop:  # once, unless the grain straddles two windows
            start, places = self._window(epoch, lane, first // self.window)
            part = places[first - start : stop - start]
            parts.append(start + part)
            first += len(part)
        places = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._in_shards(epoch, lane * self.lane_samples + places)

    def replacements(self, epoch: int, grain: int, item: int) -> Iterator[tuple[int, int]]:
        """(shard, index) of the other samples in the window of a grain's sample, from the next one onwards."""
        lane, first = self._lane_and_first(grain)
        start, places = self._window(epoch, lane, (first + item) // self.window)
        own = first + item - start
        others = lane * self.lane_samples + start + np.concatenate((places[own + 1 :], places[:own]))
        shards, indices = self._in_shards(epoch, others)
        return zip(shards.tolist(), indices.tolist(), strict=True)

    def _lane_and_first(self, grain: int) -> tuple[int, int]:
        return grain % self.lanes, grain // self.lanes * self.grain

    def _window(self, epoch: int, lane: int, window: int) -> tuple[int, np.ndarray]:
        # A reader walks each of its lanes forwards, so one window a lane is all that is ever needed again.
        start = window * self.window
        cached = self._windows.get(lane)
        if cached is None or cached[:2] != (epoch, window):
            size = min(self.window, self.lane_samples - start)
            places = permutation(self.seed, Purpose.WINDOW, window, lane, epoch, size=size).astype(np.int32)
            self._windows[lane] = cached = (epoch, window, places)
        return start, cached[2]

    def _make_epoch_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(self.seed, Purpose.SHARDS, epoch, size=len(self._sizes))
        return shards, np.cumsum(self._sizes[shards])

    def _in_shards(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, stops = self._epoch_plan(epoch)
        ranks = np.searchsorted(stops, places, side="right")
        found = shards[ranks]
        return found, places - (stops[ranks] - self._sizes[found])


def _make_order(sizes: np.ndarray, seed: int, grain: int, lanes: int, window: int) -> Order:
    return Order(sizes.tolist(), seed=seed, grain=grain, lanes=lanes, window=window)


@dataclass(frozen=True)
class DataState:
    """All there is to know about the input's progress; equal on every rank, whatever the layout."""

    epoch: int
    grains: int  # taken by the trainer in this epoch
    manifest: str  # hash
    seed: int
    grain: int
    lanes: int
    window: int

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, object]) -> DataState:
        """Reads `to_dict`.

        Raises:
            DataError: A field is missing, unknown or of the wrong type.
        """
        kinds = {field.name: str if field.name == "manifest" else int for field in fields(cls)}
        if content.keys() != kinds.keys() or any(type(content[name]) is not kind for name, kind in kinds.items()):
            raise DataError(
                f"A data state needs the fields {', '.join(kinds)}, but {content} was saved: "
                f"resume with the version of the toolkit that saved it."
            )
        return cls(**content)  # pyright: ignore[reportArgumentType]

    def check_resumable(self, run: DataState) -> None:
        """Refuses to continue in another order of the data than that of `run`, the present configuration.

        The global batch, the accumulation, ranks and workers may change: none of them changes the order.

        Raises:
            DataError: Names each field that differs, both values and the fix.
        """
        keys = {"manifest": "data.train", "seed": "seed", "grain": "data.grain", "lanes": "data.lanes"}
        keys["window"] = "data.window"
        differing = [
            f"{key} (saved {_brief(getattr(self, name))}, now {_brief(getattr(run, name))})"
            for name, key in keys.items()
            if getattr(self, name) != getattr(run, name)
        ]
        if differing:
            raise DataError(
                f"The checkpoint was saved in another order of the data: {', '.join(differing)}. "
                f"Set these back to the saved values to resume, or start a new run in another folder."
            )


def _brief(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Steps:
    """Cuts epochs into optimizer steps, micro-steps and ranks: step t takes the grains [tB, (t+1)B).

    Args:
        grains_per_epoch: Of the order.
        grains_per_step: B, the global batch over the grain.
        accumulation: Micro-steps of a step.

    Raises:
        DataError: An epoch is shorter than one step.
    """

    grains_per_epoch: int
    grains_per_step: int
    accumulation: int

    def __post_init__(self) -> None:
        if self.grains_per_epoch < self.grains_per_step:
            raise DataError(
                f"One global batch takes {self.grains_per_step:,} grains but an epoch has only "
                f"{self.grains_per_epoch:,}: lower global_batch, or add data."
            )

    @property
    def per_epoch(self) -> int:
        """Known beforehand on every rank; the grains left over are dropped."""
        return self.grains_per_epoch // self.grains_per_step

    def place(self, epoch: int, grains: int, step: int) -> tuple[int, int]:
        """(epoch, first grain) of the `step`-th step (from 0) after `grains` of `epoch` have been taken."""
        left = (self.grains_per_epoch - grains) // self.grains_per_step
        if step < left:
            return epoch, grains + step * self.grains_per_step
        more, rest = divmod(step - left, self.per_epoch)
        return epoch + 1 + more, rest * self.grains_per_step

    def micro_steps(self, epoch: int, grains: int) -> Iterator[tuple[int, int]]:
        """(epoch, first grain) of every micro-step from there on, without end."""
        step, micro = 0, self.grains_per_step // self.accumulation
        while True:
            at, first = self.place(epoch, grains, step)
            for a in range(self.accumulation):
                yield at, first + a * micro
            step += 1
