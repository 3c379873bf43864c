"""Where every element of a checkpoint lies.

The parts of all parameters lie end to end on one line: a parameter after the other, each cut along one dim as its
tensor-parallel ranks hold it, each part flat in row-major order. What a rank writes is a list of intervals of that
line, 16 bytes for each: the four million intervals of thousands of ranks are gathered, checked and sorted in a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.checkpoint.boxes import Box
from pretrain.errors import CheckpointError

TRAINED, FROZEN = ("master", "exp_avg", "exp_avg_sq"), ("master",)  # what is kept of a parameter
ITEM = 4  # bytes of an element: all is fp32
TABLE, INTERVALS = "index.json", "intervals.bin"

Count = Annotated[int, Field(ge=0, le=2**56)]


class Parameter(BaseModel):
    """A parameter, and how it is cut."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    shape: Annotated[list[Count], Field(min_length=1, max_length=8)]
    dim: Count
    cuts: Annotated[list[Count], Field(min_length=2)]
    """Where along `dim` its parts begin, and where the last one ends."""
    trained: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def kinds(self) -> tuple[str, ...]:
        return TRAINED if self.trained else FROZEN

    def parts(self) -> Iterator[tuple[int, Box]]:
        """Where each part begins among the elements of this parameter's parts, and which piece of it that is."""
        row = self.numel // self.shape[self.dim]
        for start, stop in pairwise(self.cuts):
            offset, size = [0] * len(self.shape), list(self.shape)
            offset[self.dim], size[self.dim] = start, stop - start
            yield start * row, Box(tuple(offset), tuple(size))

    def problem(self) -> str | None:
        """Why the parts do not make up the parameter."""
        if not 0 < self.numel < 2**56 or self.dim >= len(self.shape):
            return f"{self.name} cannot have shape {self.shape} and be cut along dim {self.dim}"
        ends = [self.cuts[0], self.cuts[-1]]
        if ends != [0, self.shape[self.dim]] or any(start >= stop for start, stop in pairwise(self.cuts)):
            return f"the parts of {self.name} do not make it up: they begin at {self.cuts} of {self.shape[self.dim]}"
        return None


class Stream(BaseModel):
    """What one rank keeps of the parameters of one sort: for each kind, its intervals one after the other."""

    model_config = ConfigDict(strict=True, extra="forbid")

    file: str
    position: Count  # bytes
    trained: bool
    elements: Count  # of each kind
    intervals: Count

    @property
    def stop(self) -> int:
        return self.position + self.elements * ITEM * len(TRAINED if self.trained else FROZEN)


class Table(BaseModel):
    """The small part of an index."""

    model_config = ConfigDict(strict=True, extra="forbid")

    parameters: list[Parameter]  # those that are trained first
    streams: list[Stream]


class Entry(NamedTuple):
    """A part of a parameter, as a rank describes what it holds."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    trained: bool


class Found(NamedTuple):
    """An interval of a part, and where it is stored."""

    part: Box
    start: int  # among the part's elements
    stop: int
    stream: Stream
    position: int  # in bytes, of the first kind


def merge(entries: Sequence[Sequence[Entry]]) -> tuple[list[Parameter], list[NDArray]]:
    """The parameters of which ranks hold parts, and for each rank's list where the parts in it begin on the line."""
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}
    dims: dict[str, int] = {}
    begins: dict[str, set[int]] = {}
    for entry in (entry for part in entries for entry in part):
        shapes[entry.name] = entry.shape, entry.trained
        for dim, (size, full) in enumerate(zip(entry.size, entry.shape, strict=True)):
            if size != full:
                dims[entry.name] = dim
                begins.setdefault(entry.name, set()).add(entry.offset[dim])
    parameters = [
        Parameter(
            name=name,
            shape=list(shape),
            dim=(dim := dims.get(name, 0)),
            cuts=[*sorted(begins.get(name, {0})), shape[dim]],
            trained=trained,
        )
        for name, (shape, trained) in sorted(shapes.items(), key=lambda item: not item[1][1])
    ]
    bases = _bases(parameters)
    line = {
        (parameter.name, box.offset): bases[parameter.name] + begin
        for parameter in parameters
        for begin, box in parameter.parts()
    }
    return parameters, [np.array([line[e.name, e.offset] for e in part], np.int64) for part in entries]


class Index:
    """All parameters, and the intervals in which they are stored: (N, 2) int64, start and length, stream by stream."""

    def __init__(self, table: Table, intervals: NDArray) -> None:
        self.table = table
        self.parameters = {parameter.name: parameter for parameter in table.parameters}
        self.intervals = intervals
        self._bases = _bases(table.parameters)
        self._firsts = np.cumsum([0, *(stream.intervals for stream in table.streams)])

    @classmethod
    def open(cls, checkpoint: Path) -> "Index":
        """
        Raises:
            CheckpointError: what is there describes no checkpoint; the message says why.
        """
        try:
            table = Table.model_validate_json((checkpoint / TABLE).read_bytes())
            index = cls(table, np.fromfile(checkpoint / INTERVALS, "<i8").reshape(-1, 2))
        except ValidationError as error:
            raise CheckpointError(f"{TABLE}: {first_of(error)}") from None
        except ValueError:
            raise CheckpointError(f"{INTERVALS} is not a list of pairs of numbers") from None
        if problem := index.sort():
            raise CheckpointError(f"{TABLE} and {INTERVALS}: {problem}")
        return index

    def sort(self) -> str | None:
        """Makes it ready for `find`, or says why it does not store each element of all parameters just once."""
        table, (starts, lengths) = self.table, self.intervals.T
        if len(self.parameters) < len(table.parameters):
            return "a parameter is in it twice"
        if problem := next((why for parameter in table.parameters if (why := parameter.problem())), None):
            return problem
        total = sum(parameter.numel for parameter in table.parameters)
        trained = sum(parameter.numel for parameter in table.parameters if parameter.trained)
        if any(a.trained < b.trained for a, b in pairwise(table.parameters)):
            return "frozen parameters are not the last"
        if self._firsts[-1] != len(starts) or not len(starts):
            return f"{len(starts)} intervals are there, and the streams hold {self._firsts[-1]}"
        if starts.min() < 0 or lengths.min() < 1 or starts.max() >= total or lengths.max() > total:
            return "an interval lies outside of all parameters"
        self._order = np.argsort(starts)
        self._starts = starts[self._order]
        ends = self._starts + lengths[self._order]
        if self._starts[0] != 0 or ends[-1] != total or (self._starts[1:] != ends[:-1]).any():
            return "elements are missing, or stored twice"
        begins = np.array([self._bases[p.name] + begin for p in table.parameters for begin, _ in p.parts()])
        if (self._starts[np.searchsorted(self._starts, begins).clip(max=len(starts) - 1)] != begins).any():
            return "an interval reaches from one part into the next"
        counts = [stream.intervals for stream in table.streams]
        if ((starts < trained) != np.repeat([stream.trained for stream in table.streams], counts)).any():
            return "a parameter is trained in one place and frozen in another"
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        stored = np.diff(self._ends[self._firsts]).tolist()
        if stored != [stream.elements for stream in table.streams]:
            return "a stream holds other elements than its intervals"
        return None

    def misfit(self, sizes: Mapping[str, int]) -> str | None:
        """Why it is not about files of these sizes."""
        by_file: dict[str, list[Stream]] = {}
        for stream in self.table.streams:
            by_file.setdefault(stream.file, []).append(stream)
        for file, streams in by_file.items():
            streams.sort(key=lambda stream: stream.position)
            if file not in sizes:
                return f"{TABLE} names {file!r}, which is no file of the checkpoint"
            if streams[-1].stop > sizes[file] or any(a.stop > b.position for a, b in pairwise(streams)):
                return f"{TABLE} describes other contents of {file} than it can have"
        return None

    def find(self, parameter: Parameter, piece: Box) -> Iterator[Found]:
        """The intervals that hold elements of a piece of a parameter, and perhaps a few that hold none."""
        for begin, part in parameter.parts():
            if (common := part.intersect(piece)) is None:
                continue
            last = tuple(offset + size - 1 for offset, size in zip(*common, strict=True))
            base = self._bases[parameter.name] + begin
            first, stop = base + _flat(common.offset, part), base + _flat(last, part) + 1
            at = int(np.searchsorted(self._starts, first, side="right")) - 1
            for number in self._order[at : int(np.searchsorted(self._starts, stop))].tolist():
                start, length = self.intervals[number].tolist()
                stream_number = int(np.searchsorted(self._firsts, number, side="right")) - 1
                stream = self.table.streams[stream_number]
                inside = int(self._ends[number] - self._ends[self._firsts[stream_number]])
                yield Found(part, start - base, start + length - base, stream, stream.position + ITEM * inside)


def first_of(error: ValidationError) -> str:
    """What is wrong with a piece of JSON, in words."""
    details = error.errors(include_url=False)[0]
    where = ".".join(map(str, details["loc"]))
    return f"{where}: {details['msg']}" if where else details["msg"]


def _bases(parameters: Sequence[Parameter]) -> dict[str, int]:
    """Where each parameter begins on the line."""
    sums: Any = accumulate((parameter.numel for parameter in parameters), initial=0)
    return {parameter.name: base for parameter, base in zip(parameters, sums, strict=False)}


def _flat(place: Sequence[int], box: Box) -> int:
    """Which of the box's elements, in row-major order, is the one at this place of the parameter."""
    flat = 0
    for at, offset, size in zip(place, box.offset, box.size, strict=True):
        flat = flat * size + at - offset
    return flat
