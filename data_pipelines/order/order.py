"""The order of a source's samples as a pure function of (seed, epoch, shard sizes): canonical lanes.

An epoch permutes the shards, lays their samples end to end and cuts them into L equal lanes. Each lane is shuffled
window by window. The unit is a grain of m samples; grain g of an epoch is item g div L of lane g mod L, so a
global batch draws from all lanes at once. Nothing here depends on ranks, workers or history: where a run stands
is a few numbers, and resuming is computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        # A reader walks each of its lanes forwards, so one window per lane is enough. Places in a window fit into 32
        # bits; those in a corpus of billions do not.
        start = window * self.window
        cached = self._windows.get(lane)
        if cached is None or cached[:2] != (epoch, window):
            size = min(self.window, self.lane_samples - start)
            places = permutation(self.seed, Purpose.WINDOW, window, lane, epoch, size=size).astype(np.int32)
            self._windows[lane] = cached = (epoch, window, places)
        return start, cached[2].astype(np.int64)

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
