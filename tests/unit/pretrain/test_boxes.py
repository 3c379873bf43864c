"""Flat slices become few boxes that cover them exactly, and boxes cut one way load into boxes cut another."""

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.boxes import Box, boxes_of_slice

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def slices(draw):
    shape = draw(shapes)
    ends = draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2))
    return shape, min(ends), max(ends)


@given(slices())
def test_the_boxes_of_a_slice_are_the_slice_in_order(case):
    shape, start, stop = case
    numbered = torch.arange(math.prod(shape)).view(shape)
    boxes = boxes_of_slice(start, stop, shape)
    whole = Box((0,) * len(shape), shape)
    values = [numbered[box.slices_in(whole)].flatten() for box in boxes]
    assert torch.cat([torch.arange(0), *values]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.numel > 0 for box in boxes)


@given(slices(), st.integers(1, 5))
def test_what_was_cut_into_parts_is_put_together_in_any_other_cut(case, parts):
    shape, start, stop = case
    numel = math.prod(shape)
    numbered = torch.arange(numel).view(shape)
    whole = Box((0,) * len(shape), shape)
    borders = [numel * part // parts for part in range(parts + 1)]
    stored = [box for a, b in pairwise(borders) for box in boxes_of_slice(a, b, shape)]
    for target in boxes_of_slice(start, stop, shape):
        filled = torch.full(target.size, -1)
        for source in stored:
            if common := target.intersect(source):
                filled[common.slices_in(target)] = numbered[source.slices_in(whole)][common.slices_in(source)]
        assert torch.equal(filled, numbered[target.slices_in(whole)])


def test_boxes_that_only_touch_do_not_intersect():
    assert Box((0, 0), (2, 3)).intersect(Box((2, 0), (2, 3))) is None
    assert Box((0, 0), (2, 3)).intersect(Box((1, 1), (5, 5))) == Box((1, 1), (1, 2))
