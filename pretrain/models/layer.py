"""Layers wired by name: a layer says what it reads and what it writes, and the ordered list of layers is the model.

Whatever else there is to know follows from the names: which layers lead to a wanted tensor, what crosses the border
between two pipeline stages, what a first pass over the global batch has to run, which objectives there are.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.collectives import Group

Flow = dict[str, Tensor]  # what a micro-batch brought, and what layers have made of it, by name
Spans = Mapping[str, slice]  # where the rows of each kind lie

LOSS, COUNTS, METRIC, TARGETS = "loss/", "counts/", "metric/", "targets/"


class Groups(NamedTuple):
    """Ranks that layers talk to; None: this process is alone."""

    samples: Group = None
    """Those whose samples belong to the same micro-step."""
    shards: Group = None
    """Those that matrices are cut over."""


class Rows(NamedTuple):
    """Rows of several kinds that layers see as one tensor, so that each layer runs once for all of them."""

    name: str
    kinds: Mapping[str, int]
    """Rows per sample of each kind, in their order."""

    def spans(self, rows: int, kinds: Sequence[str]) -> Spans:
        """Where each of `kinds`, which share `rows` rows, lies. Of a kind by itself there may be any number."""
        if len(kinds) == 1:
            return {kinds[0]: slice(0, rows)}
        unit = rows // sum(self.kinds[kind] for kind in kinds)
        borders = accumulate((unit * self.kinds[kind] for kind in kinds), initial=0)
        return {kind: slice(*ends) for kind, ends in zip(kinds, pairwise(borders), strict=True)}


class Layer(NamedTuple):
    """One layer of a model, before it is built."""

    name: str
    """The first part of its parameters' canonical names."""
    build: Callable[[], nn.Module]
    """The module's `forward(*reads)` returns one tensor, or several in the order of `writes`."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    """loss/x and counts/x report objective x: a scalar, and (2,) int64 right answers and questions. metric/x is a
    scalar that is only reported."""
    recompute: bool = False
    """Activation checkpointing may run it twice."""
    together: bool = False
    """Has no parameters, and sees all micro-batches of an optimizer step at once."""
    prior: bool = False
    """What it writes comes from a first pass without gradient, so that earlier layers can read it, too."""
    rows: Rows | None = None
    """The rows that it sees: `forward` is told their spans behind what it reads."""
    by_kind: Literal["", "reads", "writes"] = ""
    """reads: it joins the kinds of `rows`; what it reads comes kind by kind. writes: it takes them apart again."""
    only: Mapping[str, Collection[str]] = MappingProxyType({})
    """Of the last of `reads`, those that only some kinds of rows need, and which: without them, they are left out."""

    def read(self, kinds: Collection[str]) -> list[str]:
        """What it reads, if it sees rows of these kinds alone."""
        names = self._of_kinds(self.reads, kinds) if self.by_kind == "reads" else self.reads
        return [name for name in names if name not in self.only or set(kinds) & set(self.only[name])]

    def written(self, kinds: Collection[str]) -> list[str]:
        """What it then writes."""
        return self._of_kinds(self.writes, kinds) if self.by_kind == "writes" else list(self.writes)

    def spans(self, kinds: Sequence[str], flow: Flow) -> Spans:
        """Where the rows of each kind lie in what it reads; of a layer that joins them, which kinds there are."""
        assert self.rows is not None
        if self.by_kind == "reads":
            return dict.fromkeys(kinds, slice(0))
        return self.rows.spans(len(flow[self.reads[0]]), kinds)

    def _of_kinds(self, names: Sequence[str], kinds: Collection[str]) -> list[str]:
        assert self.rows is not None
        each = len(names) // len(self.rows.kinds)
        owners = [kind for kind in self.rows.kinds for _ in range(each)]
        return [name for name, owner in zip(names, owners, strict=True) if owner in kinds]


class Call(NamedTuple):
    """One layer of a pass."""

    layer: Layer
    kinds: tuple[str, ...]
    """The kinds of its rows that this pass needs."""
    reads: frozenset[str]
    """What it reads in this pass."""
    after: frozenset[str]
    """What later layers read or the caller wants, at the moment after this layer."""

    def crossing(self, have: Collection[str]) -> frozenset[str]:
        """What crosses a border between pipeline stages behind this layer, if all of them `have` the same."""
        return self.after - set(have)


class Objective(NamedTuple):
    """One of the losses that are optimised together."""

    name: str
    weight: float
    targets: Callable[[Tensor], Tensor] | None = None
    """Number of target tokens in a micro-batch, from its captions, where the loss is a mean over all target tokens of a
    step; None: the loss is a mean over samples. The layer reads what an average micro-batch has, as targets/x."""


class Architecture(NamedTuple):
    """A model before it is built: what a file of this folder makes of a config."""

    layers: Sequence[Layer]
    objectives: Sequence[Objective]

    @property
    def reports(self) -> list[str]:
        """What a training step wants: every loss, its counts, and figures besides."""
        written = [name for layer in self.layers for name in layer.writes]
        return [name for name in written if name.startswith((LOSS, COUNTS, METRIC))]

    @property
    def metrics(self) -> list[str]:
        """Figures that layers report besides losses and counts."""
        return [name for name in self.reports if name.startswith(METRIC)]

    @property
    def handed_on(self) -> set[str]:
        """What a first pass makes, and the training pass finds there."""
        return {name for layer in self.layers if layer.prior for name in layer.writes}

    @property
    def first(self) -> set[str]:
        """What a first pass without gradient, over all micro-batches of a step, has to make; often nothing."""
        return self.handed_on | {name for layer in self.layers if layer.together for name in layer.reads}

    @property
    def calls(self) -> list[Call]:
        """All that a training step runs: the first pass, then the training pass."""
        return [*leading_to(self.layers, self.first, ()), *leading_to(self.layers, self.reports, self.handed_on)]

    @property
    def columns(self) -> set[str]:
        """What it reads of a batch."""
        written = {name for layer in self.layers for name in layer.writes}
        read = {name for call in self.calls for name in call.reads - written}
        return {name for name in read if not name.startswith(TARGETS)}


class WiringError(Exception):
    """The list of layers does not hang together; the message says where, and what to do."""


def leading_to(layers: Sequence[Layer], want: Iterable[str], have: Collection[str]) -> list[Call]:
    """The layers that lead to `want`, in order. What is in `have` need not be made, nor what only it is made of.

    Of rows that are joined, only the kinds run that something wanted is made of.
    """
    wanted, kinds, calls = set(want) - set(have), dict[str, set[str]](), list[Call]()
    for layer in reversed(layers):
        if not wanted & set(layer.writes):
            continue
        after, here = frozenset(wanted), ()
        if layer.rows:
            live = kinds.setdefault(layer.rows.name, set())
            if layer.by_kind == "writes":
                live |= {kind for kind in layer.rows.kinds if wanted & set(layer.written([kind]))}
            here = tuple(kind for kind in layer.rows.kinds if kind in live)
        reads = frozenset(layer.read(here))
        wanted = (wanted - (set(layer.writes) - reads)) | (reads - set(have))
        calls.append(Call(layer, here, reads, after))
    return calls[::-1]


def join(rows: Rows, writes: tuple[str, ...], **reads: tuple[str, ...]) -> Layer:
    """Lays the rows of several kinds end to end: each kind has one of `reads` for each of `writes`."""
    assert list(reads) == list(rows.kinds)
    names = tuple(name for kind in reads.values() for name in kind)
    return Layer(f"join_{rows.name}", Join, names, writes, rows=rows, by_kind="reads")


def split(rows: Rows, reads: tuple[str, ...], **writes: tuple[str, ...]) -> Layer:
    """Takes them apart again, under new names."""
    assert list(writes) == list(rows.kinds)
    names = tuple(name for kind in writes.values() for name in kind)
    return Layer(f"split_{rows.name}", Split, reads, names, rows=rows, by_kind="writes")


class Join(nn.Module):
    def forward(self, *read: Tensor, spans: Spans) -> tuple[Tensor, ...]:
        each = len(read) // len(spans)
        return tuple(read[i] if len(spans) == 1 else _rows_of(read[i::each]) for i in range(each))


class Split(nn.Module):
    def forward(self, *read: Tensor, spans: Spans) -> tuple[Tensor, ...]:
        return tuple(tensor[span] for span in spans.values() for tensor in read)


def _rows_of(parts: Sequence[Tensor]) -> Tensor:
    """Parts end to end. Masks of what each token sees may differ in how many dims they spell out."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([part.expand(-1, *shape) for part in parts])


def check(architecture: Architecture, columns: Collection[str]) -> None:
    """Sees that every name is written before it is read, and that every layer leads to a loss.

    Args:
        architecture: a model before it is built.
        columns: what a batch may bring.

    Raises:
        WiringError: the first layer that does not fit, and the way out.
    """
    for layer in architecture.layers:  # what is left out must not shift what is not
        assert set(layer.reads[len(layer.reads) - len(layer.only) :]) == layer.only.keys()
    brought = {*columns, *(TARGETS + objective.name for objective in architecture.objectives)}
    writers = {name: layer.name for layer in architecture.layers for name in layer.writes}
    known = brought | architecture.handed_on
    for layer, _, reads, _ in architecture.calls:
        for name in sorted(reads - known):
            if name in writers:
                raise WiringError(
                    f"layer {layer.name} reads {name}, which {writers[name]} writes only behind it: move it"
                )
            near = difflib.get_close_matches(name, sorted({*columns, *writers}), n=1, cutoff=0)
            raise WiringError(
                f"layer {layer.name} reads {name}, which no layer writes and no column of the data brings; the nearest "
                f"name that there is is {near[0]}"
            )
        if taken := set(layer.writes) & brought:
            raise WiringError(f"layer {layer.name} writes {min(taken)}, which a column of the data brings: rename it")
        known |= set(layer.writes)
    reported = {name.removeprefix(LOSS) for name in architecture.reports if name.startswith(LOSS)}
    for objective in architecture.objectives:
        if objective.name not in reported:
            raise WiringError(f"objectives.{objective.name} is on, and no layer writes {LOSS}{objective.name}")
    used = {call.layer.name for call in architecture.calls}
    for layer in architecture.layers:
        if layer.name not in used and not layer.by_kind:
            raise WiringError(
                f"layer {layer.name} leads to no loss, so that nothing would train it: the objectives that are on are "
                f"{', '.join(sorted(reported)) or 'none'}; switch on one that needs it, or choose another "
                f"model.architecture"
            )
