"""Every layout takes the very steps that plain PyTorch takes in one process.

Over ten steps in fp32, losses to 1e-5, gradient norms to 1e-4, right answers exactly: one global batch, one matching
pool, all objectives of the architecture, clipping that bites.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distributed.layouts import LAYOUTS
from distributed.tiny import GLOBAL_NEGATIVES, Point, assert_same_curve, engine_curve, plain_curve, tiny_config
from pretrain.config import Config

THREE = ("ZeRO-3 x dp 2", "ZeRO-1 x tp 2 x dp 2", "ZeRO-1 x pp 2")  # every way to spread a model, once
ARCHITECTURES = {  # what the config says besides, and on which layouts
    "albef": ({}, LAYOUTS),
    "clip": ({}, LAYOUTS),
    "coca": ({"objectives__captioning": {"weight": 2.0, "label_smoothing": 0.1}}, THREE),
}
CASES = [(architecture, layout) for architecture, (_, layouts) in ARCHITECTURES.items() for layout in layouts]
GLOBAL_CASES = [case for case in CASES if case[0] != "clip"]
STEPS, FEWER_STEPS = 10, 6
README = Path(__file__).parents[2] / "README.md"
RANKS = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}


def config_of(architecture: str, accumulation: int, **changes: Any) -> Config:
    own, _ = ARCHITECTURES[architecture]
    return tiny_config(model__architecture=architecture, training__accumulation=accumulation, **own, **changes)


@cache
def reference(architecture: str, accumulation: int) -> list[Point]:
    return plain_curve(config_of(architecture, accumulation), STEPS)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_learns_and_is_clipped(architecture, accumulation):
    curve = reference(architecture, accumulation)
    assert sum(curve[-1].losses.values()) < sum(curve[0].losses.values())
    assert all(point.norm > tiny_config().optimizer.clip for point in curve)


def test_the_readme_lists_these_layouts():
    rows = re.findall(r"^\| ((?:1 rank|[dtp]p \d)[^|]*) \| (\d) \| ([\d, ]+) \|$", README.read_text(), re.MULTILINE)
    listed = {
        (f"ZeRO-{stage}{', ' if 'rank' in name else ' x '}{name}", int(ranks))
        for name, ranks, stages in rows
        for stage in stages.split(", ")
    }
    assert listed == {(name, RANKS[ranks]) for name, (ranks, _) in LAYOUTS.items()}


@pytest.mark.parametrize(("architecture", "layout"), CASES)
def test_its_steps_are_those_of_one_process(request, architecture, layout):
    ranks, changes = LAYOUTS[layout]
    config = config_of(architecture, accumulation=2, **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference(architecture, 2))


@pytest.mark.parametrize(("architecture", "layout"), GLOBAL_CASES)
def test_with_negatives_of_the_global_batch_accumulation_is_the_whole_batch(request, architecture, layout):
    """Plain PyTorch takes the whole batch at once, which needs no second pass."""
    ranks, changes = LAYOUTS[layout]
    accumulation = 2 if ranks == "four_ranks" else 4
    config = config_of(architecture, accumulation, **GLOBAL_NEGATIVES, **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, FEWER_STEPS):
        assert_same_curve(curve, reference(architecture, 1)[:FEWER_STEPS])
