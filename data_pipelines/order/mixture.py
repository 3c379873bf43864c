"""Which source each grain of a run comes from, as a pure function of the shares: no state, no draws to replay.

Grain k of the run is some grain of one source. Up to a block's border each source has had its share of all grains,
rounded; inside a block the sources stand in a random order, so that no rank or worker is bound to one of them.
A change of shares begins a new segment, and leaves all that came before it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from pydantic import ValidationError

from data_pipelines.config import Section
from data_pipelines.errors import DataError
from data_pipelines.randomness import Purpose, permutation

BLOCK = 64  # grains


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportion of `weights`, exactly as the decimals are written.

    Raises:
        ValueError: All are zero.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    if not sum(exact):
        raise ValueError("every weight is 0")
    unit = Fraction(1, lcm(*(weight.denominator for weight in exact)))
    numbers = [int(weight / unit) for weight in exact]
    divisor = int(np.gcd.reduce(numbers))
    return tuple(number // divisor for number in numbers)


@dataclass(frozen=True)
class Segment:
    """A stretch of the run in which the sources keep their shares."""

    seed: int
    start: int  # the first grain of the run that belongs to it
    taken: tuple[int, ...]  # grains of each source before it
    shares: tuple[int, ...]  # whole numbers; 0 for a source that rests

    def place(self, grain: int) -> tuple[int, int]:
        """(source, number of the grain among all grains of that source) of a grain of the run."""
        block, item = divmod(grain - self.start, BLOCK)
        sources, numbers = _block(self, block)
        return sources[item], numbers[item]

    def taken_before(self, grain: int) -> tuple[int, ...]:
        """Grains of each source before a grain of the run."""
        block, item = divmod(grain - self.start, BLOCK)
        inside = np.bincount(_block(self, block)[0][:item], minlength=len(self.shares))
        return tuple((np.add(self._shared_out(block * BLOCK), inside) + self.taken).tolist())

    def _shared_out(self, grains: int) -> list[int]:
        # The first source takes its share of all, rounded; the second its share of the rest; and so on. No count
        # ever falls as `grains` grows, and together they are `grains`.
        counts: list[int] = []
        total = sum(self.shares)
        for share in self.shares:
            counts.append((2 * grains * share + total) // (2 * total) if share else 0)
            grains -= counts[-1]
            total -= share
        return counts


@lru_cache(maxsize=16)
def _block(segment: Segment, block: int) -> tuple[list[int], list[int]]:
    first = np.array(segment._shared_out(block * BLOCK))
    counts = np.array(segment._shared_out((block + 1) * BLOCK)) - first
    order = permutation(segment.seed, Purpose.MIXTURE, block, segment.start, size=BLOCK)
    sources = np.repeat(np.arange(len(counts)), counts)[order]
    numbers = np.empty(BLOCK, dtype=np.int64)
    for source, count in enumerate(counts.tolist()):
        numbers[sources == source] = segment.taken[source] + first[source] + np.arange(count)
    return sources.tolist(), numbers.tolist()


class SourceIdentity(Section):
    """What fixes the order of a source's samples, besides the seed and the grain."""

    manifest: str  # hash
    lanes: int
    window: int


class LeftOut(Section):
    """Grains of the run that it jumps over, from the first step that begins in them."""

    start: int
    stop: int
    taken: dict[str, int]  # grains of each source before `stop`


class DataState(Section):
    """All there is to know about the input's progress; equal on every rank, whatever the layout."""

    step: int
    grains: int  # taken by the trainer in the whole run
    seed: int
    grain: int  # samples of one
    sources: dict[str, SourceIdentity]  # in the order of `segment`
    segment: Segment
    left_out: tuple[LeftOut, ...] = ()  # in the whole run, wherever it stands

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, content: dict[str, object]) -> DataState:
        """Reads `to_dict`.

        Raises:
            DataError: A field is missing, unknown or of the wrong type.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            where = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
            raise DataError(
                f"The state of the data that was saved, {content}, cannot be read (see {where}): "
                f"resume with the version of the toolkit that saved it."
            ) from None

    def check_resumable(self, run: DataState) -> None:
        """Refuses to continue in another order of the data than that of `run`, the present configuration.

        The global batch, the accumulation, ranks and workers may change, and so may weights; a source may be added.
        None of them changes the order of what a source has still to give.

        Raises:
            DataError: Names each field that differs, both values and the fix.
        """
        pairs: list[tuple[str, object, object]] = [("seed", self.seed, run.seed), ("data.grain", self.grain, run.grain)]
        gone = [name for name in self.sources if name not in run.sources]
        for name, saved in self.sources.items():
            if name not in run.sources:
                continue
            now, where = run.sources[name], f" of {name}" if len(run.sources) > 1 else ""
            pairs += [(f"data.train{where}", saved.manifest[:12], now.manifest[:12])]
            pairs += [(f"data.lanes{where}", saved.lanes, now.lanes), (f"data.window{where}", saved.window, now.window)]
        differing = [f"{key} (saved {saved}, now {now})" for key, saved, now in pairs if saved != now]
        if gone:
            differing.append(f"data.train has no {', '.join(gone)} (give it back, with weight 0 to read no more of it)")
        if differing:
            raise DataError(
                f"The checkpoint was saved in another order of the data: {', '.join(differing)}. "
                f"Set these back to the saved values to resume, or start a new run in another folder."
            )
