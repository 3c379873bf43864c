"""How numbers and values are distributed, counted so that parts add up exactly."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.text import to_json

_PERCENTS = (5, 50, 95)
_TEXT_SHOWN = 40  # characters of a value of json


@dataclass
class Distribution:
    """How whole numbers are distributed. Sum, least and most are exact; so is each number up to 999.

    Larger ones are told apart by their first three digits, which bounds the memory.
    """

    counts: Counter[int] = field(default_factory=Counter)
    sum: int = 0
    least: int = 0
    most: int = 0

    def add(self, number: int) -> None:
        """One number, 0 or above."""
        self.least = min(self.least, number) if self.counts else number
        self.most = max(self.most, number)
        self.counts[number if number < 1000 else _three_digits(number)] += 1
        self.sum += number

    def merge(self, other: Distribution) -> None:
        """All numbers of another."""
        if not other.counts:
            return
        self.least = min(self.least, other.least) if self.counts else other.least
        self.most = max(self.most, other.most)
        self.counts.update(other.counts)
        self.sum += other.sum

    @property
    def mean(self) -> float:
        """0 where there are no numbers."""
        return self.sum / max(1, self.counts.total())

    def percentile(self, percent: int) -> int:
        """The least number that so many percent do not exceed; 0 where there are none."""
        wanted, reached = math.ceil(self.counts.total() * percent / 100), 0
        for number, count in sorted(self.counts.items()):
            reached += count
            if reached >= wanted:
                return max(number, self.least)
        return 0

    def summary(self, unit: int = 1) -> dict[str, float]:
        """Mean, percentiles and extremes, divided by `unit`."""
        found = {"mean": self.mean, "min": self.least}
        found |= {f"p{percent}": self.percentile(percent) for percent in _PERCENTS}
        return {name: round(value / unit, 3) for name, value in (found | {"max": self.most}).items()}


@dataclass
class JsonField:
    """The values of one field of json: how many, and between which they lie."""

    samples: int = 0  # that have it
    numbers: list[float] = field(default_factory=list)  # least and most, where there are any
    texts: list[str] = field(default_factory=list)  # first and last by alphabet, where there are any

    def add(self, value: object) -> None:
        """The value of one sample."""
        self.samples += 1
        if isinstance(value, str):
            self._widen(self.texts, [value[:_TEXT_SHOWN]])
        elif isinstance(value, bool):
            self._widen(self.texts, [to_json(value)])
        elif isinstance(value, int | float) and abs(value) < 1e300:  # neither NaN nor infinite, nor too large for one
            self._widen(self.numbers, [float(value)])

    def merge(self, other: JsonField) -> None:
        """All values of another."""
        self.samples += other.samples
        self._widen(self.numbers, other.numbers)
        self._widen(self.texts, other.texts)

    @property
    def range(self) -> str:
        """As it is shown."""
        ends = [[f"{number:g}" for number in self.numbers], self.texts]
        return ", ".join(" to ".join(dict.fromkeys(both)) for both in ends if both)

    @staticmethod
    def _widen(ends: list[Any], values: list[Any]) -> None:
        if values:
            ends[:] = min([*ends, *values]), max([*ends, *values])


def _three_digits(number: int) -> int:
    unit = 10 ** (len(str(number)) - 3)
    return number // unit * unit
