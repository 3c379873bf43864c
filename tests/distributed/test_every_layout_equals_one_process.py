"""Every layout takes the very steps that plain PyTorch takes in one process.

Over ten steps in fp32, losses to 1e-5, gradient norms to 1e-4, right answers exactly: one global batch, one matching
pool, all objectives of the architecture, clipping that bites.
"""

import re
from pathlib import Path

import pytest

from distributed.layouts import LAYOUTS
from distributed.tiny import GLOBAL_NEGATIVES, assert_same_curve, engine_curve, plain_curve, tiny_config

ARCHITECTURES = {"albef": {}, "clip": {"model__architecture": "clip"}}
STEPS, FEWER_STEPS = 10, 6
README = Path(__file__).parents[2] / "README.md"
RANKS = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}


@pytest.fixture(scope="module")
def references():
    """By architecture and accumulation."""
    return {
        (architecture, accumulation): plain_curve(tiny_config(training__accumulation=accumulation, **changes), STEPS)
        for architecture, changes in ARCHITECTURES.items()
        for accumulation in (1, 2)
    }


def test_the_references_learn_and_are_clipped(references):
    for curve in references.values():
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_steps_are_those_of_one_process(request, references, layout, architecture):
    ranks, changes = LAYOUTS[layout]
    config = tiny_config(training__accumulation=2, **ARCHITECTURES[architecture], **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, STEPS):
        assert_same_curve(curve, references[architecture, 2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_negatives_of_the_global_batch_accumulation_is_the_whole_batch(request, references, layout):
    """Plain PyTorch takes the whole batch at once, which needs no second pass."""
    ranks, changes = LAYOUTS[layout]
    accumulation = 2 if ranks == "four_ranks" else 4
    config = tiny_config(training__accumulation=accumulation, **GLOBAL_NEGATIVES, **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, FEWER_STEPS):
        assert_same_curve(curve, references["albef", 1][:FEWER_STEPS])
