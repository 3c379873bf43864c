"""Samples to rows, and rows to a micro-batch: the unit of work that training and evaluation share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipelines.batch import BadSample, Batch, Record
from data_pipelines.errors import DataError, SampleError
from data_pipelines.randomness import Purpose, uniform
from data_pipelines.samples.columns import CaptionColumn, Column, Pair, Row
from data_pipelines.shards.sample import Sample


def draw_pair(sample: Sample | SampleError, position: int, seed: int) -> Pair | SampleError:
    """A sample with one of its captions, drawn by its position; or why there is none."""
    if isinstance(sample, SampleError):
        return sample
    try:
        captions = sample.captions()
    except SampleError as error:
        return error
    chosen = int(uniform(seed, Purpose.CAPTION, position, size=1)[0] * len(captions)) if len(captions) > 1 else 0
    return Pair(sample, captions[chosen], position)


@dataclass(frozen=True)
class Assembler:
    """Turns pairs into rows of the tensors of a `Batch`, by what `open_columns` gives."""

    columns: Sequence[Column]

    def rows(self, pairs: Iterable[Pair | SampleError]) -> list[Row | SampleError]:
        """One row of every tensor for each pair, with an error in the place of one that cannot be used.

        Column by column: each goes over all pairs before the next begins.
        """
        items = list(pairs)
        rows: list[Row] = [{} for _ in items]
        for column in self.columns:
            for place, pair in enumerate(items):
                if isinstance(pair, SampleError):
                    continue
                try:
                    rows[place] |= _row(column, pair)
                except SampleError as error:
                    items[place] = error
        return [row if isinstance(item, Pair) else item for item, row in zip(items, rows, strict=True)]

    def row(self, pair: Pair | SampleError) -> Row:
        """The same for one pair.

        Raises:
            SampleError: It cannot be used.
        """
        (row,) = self.rows([pair])
        if isinstance(row, SampleError):
            raise row
        return row

    def usable_captions(self, sample: Sample, position: int) -> tuple[int, ...]:
        """Which captions of a sample can be used. All else of it is looked at once.

        Raises:
            SampleError: None of them, or something else of it cannot be used.
        """
        pairs = [Pair(sample, caption, position) for caption in sample.captions()]
        by_caption = Assembler([column for column in self.columns if isinstance(column, CaptionColumn)])
        usable = [place for place, row in enumerate(by_caption.rows(pairs)) if not isinstance(row, SampleError)]
        self.row(pairs[usable[0] if usable else 0])
        return tuple(usable)


def _row(column: Column, pair: Pair) -> Row:
    if not any(extension in pair.sample.members for extension in column.needs):
        raise SampleError(f"no .{' or .'.join(column.needs)}")
    row = column.row(pair)
    if row.keys() != set(column.gives):
        raise DataError(
            f"data_pipelines/batch.py says that {type(column).__name__} gives {', '.join(column.gives)}, and it gives "
            f"{', '.join(row)}: make them the same."
        )
    return row


def collate(rows: Sequence[Row], bad: Sequence[BadSample] = (), records: Sequence[Record] = ()) -> Batch:
    """Stacks rows into a micro-batch."""
    tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return Batch(tensors, tuple(bad), tuple(records))
