"""Fills a rank's fragments from a checkpoint that any layout wrote."""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.boxes import Box, boxes_of_slice
from pretrain.checkpoint.index import ITEM, Index
from pretrain.errors import CheckpointError
from pretrain.parallel.engine import Fragment


def read_fragments(checkpoint: Path, fragments: Iterable[Fragment]) -> None:
    """Fills the fragments' views. Nothing is written into them unless the checkpoint has all of them.

    Raises:
        CheckpointError: the checkpoint lacks a parameter, or has it in another shape, or cannot be read.
    """
    try:
        index = Index.open(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint {checkpoint} cannot be read: {error}.") from None
    wanted = [fragment for fragment in fragments if fragment.stop > fragment.start]
    for fragment in wanted:
        _check(fragment, index, checkpoint)
    with ExitStack() as stack:

        @cache
        def opened(file: str) -> FileIO:
            return stack.enter_context((checkpoint / file).open("rb", buffering=0))

        for fragment in wanted:
            _fill(fragment, index, opened)


def _check(fragment: Fragment, index: Index, checkpoint: Path) -> None:
    stored, shape = index.parameters.get(fragment.name), fragment.part.shape
    if stored is None:
        found = "is not in it"
    elif tuple(stored.shape) != shape:
        found = f"has shape {tuple(stored.shape)} in it"
    elif len(fragment.tensors) > len(stored.kinds):
        found = "is frozen in it, without the optimizer's moments"
    else:
        return
    raise CheckpointError(
        f"The checkpoint {checkpoint} is of another model: {fragment.name} {found}, and shape {shape} here. Restore "
        f"the model section of the config, or start a new run with another output folder."
    )


def _fill(fragment: Fragment, index: Index, opened: Callable[[str], FileIO]) -> None:
    parameter = index.parameters[fragment.name]
    rows = [parameter.kinds.index(kind) for kind in fragment.tensors]
    end = 0
    for target in _boxes(fragment.part.offset, fragment.part.size, fragment.start, fragment.stop):
        views = [flat[end : end + target.numel].view(target.size) for flat in fragment.tensors.values()]
        end += target.numel
        for found in index.find(parameter, target):
            before = 0
            for source in _boxes(found.part.offset, found.part.size, found.start, found.stop):
                if (common := target.intersect(source)) is not None:
                    for row, view in zip(rows, views, strict=True):
                        position = found.position + ITEM * (row * found.stream.elements + before)
                        values = _read(opened(found.stream.file), position, source, common)
                        view[common.slices_in(target)].copy_(values)
                before += source.numel


def _read(file: FileIO, position: int, source: Box, common: Box) -> Tensor:
    """Elements of a box that lies in a file, row after row: all of some rows, and of these what is wanted."""
    row = source.numel // source.size[0]
    skipped = common.offset[0] - source.offset[0]
    size = common.size[0], *source.size[1:]
    values = torch.empty(size)
    left, at = values.numpy().reshape(-1).view("uint8").data, position + ITEM * skipped * row
    while left:
        count = os.preadv(file.fileno(), [left], at)
        if count == 0:
            raise CheckpointError(f"{file.name} was cut off while it was read.")
        left, at = left[count:], at + count
    rows = Box((common.offset[0], *source.offset[1:]), size)
    return values[common.slices_in(rows)]


def _boxes(offset: tuple[int, ...], size: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a part that lies at `offset` of its parameter, as boxes of the parameter."""
    return [
        Box(tuple(a + b for a, b in zip(offset, box.offset, strict=True)), box.size)
        for box in boxes_of_slice(start, stop, size)
    ]
