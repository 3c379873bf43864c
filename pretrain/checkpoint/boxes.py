"""Boxes: rectangular pieces of a tensor in its own coordinates.

A layout holds flat slices of parameters, and a flat slice of an (R, C) matrix is at most three rectangles. What was
saved as some boxes is loaded into others by intersecting them.
"""

import math
from typing import NamedTuple


class Box(NamedTuple):
    """A piece of a tensor: where it begins and how far it reaches, in each dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def intersect(self, other: "Box") -> "Box | None":
        """The part that both cover, or None."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, size) if all(extent > 0 for extent in size) else None

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """How to cut this box out of a tensor that holds `outer`."""
        starts = (a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + extent) for start, extent in zip(starts, self.size, strict=True))


def boxes_of_slice(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """Elements [start, stop) of a tensor laid flat in row-major order, as boxes in that order.

    At most 2 n - 1 boxes for n dims: a rest of a row, whole rows, the beginning of a row.
    """
    if stop <= start:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    pieces = []
    while start < stop:
        index, inside = divmod(start, row)
        if inside == 0 and stop - start >= row:  # whole rows
            count = (stop - start) // row
            pieces.append(Box((index, *[0] * (len(shape) - 1)), (count, *shape[1:])))
            start += count * row
        else:  # the part of one row
            end = min(stop - index * row, row)
            for offset, size in boxes_of_slice(inside, end, shape[1:]):
                pieces.append(Box((index, *offset), (1, *size)))
            start = index * row + end
    return pieces
