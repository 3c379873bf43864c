"""Every layout takes the very steps that plain PyTorch takes in one process.

Over ten steps in fp32, losses to 1e-5, gradient norms to 1e-4, right answers exactly: one global batch, one matching
pool, all objectives of the architecture, clipping that bites. What one process saved, every layout loads, saves again
to the bit, and goes on from; and it evaluates its own model.
"""

import re
from pathlib import Path

import pytest
import torch

from distributed.layouts import LAYOUTS
from distributed.tiny import (
    ARCHITECTURES,
    GLOBAL_NEGATIVES,
    VOCABULARY,
    Point,
    assert_same_curve,
    build,
    commit,
    engine_curve,
    mesh_of,
    plain_curve,
    tiny_config,
    tiny_engine,
)
from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole
from pretrain.synthetic import made_up_batch

STEPS, FEWER_STEPS = 10, 6
GLOBAL = ("albef", "blip", "coca")  # those that contrast a global batch, with more than that to do
README = Path(__file__).parents[2] / "README.md"
RANKS = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}
WANTED = ("image_embeddings", "match_logits", "counts/masked_lm")


def case(architecture, **changes):
    return tiny_config(training__accumulation=2, **ARCHITECTURES[architecture].changes, **changes)


@pytest.fixture(scope="module")
def references():
    """By architecture."""
    return {name: plain_curve(case(name), STEPS) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def whole_batch():
    """By architecture. Plain PyTorch takes the whole batch at once, which needs no second pass."""
    return {
        name: plain_curve(tiny_config(training__accumulation=1, **ARCHITECTURES[name].changes), FEWER_STEPS)
        for name in GLOBAL
    }


@pytest.fixture(scope="module")
def saved(one_rank, tmp_path_factory):
    """What one process saved after four steps."""
    folder = tmp_path_factory.mktemp("saved")
    one_rank.run(save, folder)
    return folder


def save(mesh, folder):
    engine = tiny_engine(mesh, config := case("albef", engine__zero_stage=0))
    engine_curve(mesh, config, 4, engine)
    commit(CheckpointStore(folder, mesh.world), 4, engine)


def examine(mesh, architecture, changes, saved, again) -> list[Point]:
    """The steps of one architecture on a layout, and then those after what one process saved."""
    config = case(architecture, **changes)
    engine = tiny_engine(mesh, config)
    curve = engine_curve(mesh, config, STEPS, engine)
    if architecture == "albef":
        store = CheckpointStore(saved, mesh.world)
        checkpoint = store.newest_valid()
        store.load(checkpoint, engine.fragments())
        engine.loaded(read_run(checkpoint)["applied_steps"])
        commit(CheckpointStore(again, mesh.world), 4, engine)
        curve += engine_curve(mesh, config, 2, engine, first=4)
    return curve


def state(folder) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole."""
    found = {}
    for name, parameter in build(case("albef")).named_parameters():
        kinds = {kind: torch.empty(parameter.numel()) for kind in ("master", "exp_avg", "exp_avg_sq")}
        read_fragments(folder, [Fragment(name, whole(parameter), 0, kinds)])
        found |= {f"{kind}/{name}": tensor for kind, tensor in kinds.items()}
    return found


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


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [(name, layout) for name, each in ARCHITECTURES.items() for layout in each.layouts],
)
def test_its_steps_are_those_of_one_process(request, references, saved, tmp_path, architecture, layout):
    ranks, changes = LAYOUTS[layout]
    curves = request.getfixturevalue(ranks).run(examine, architecture, changes, saved, tmp_path)
    for curve in curves:
        assert_same_curve(curve[:STEPS], references[architecture])
        assert_same_curve(curve[STEPS:], references[architecture][4 : len(curve) - STEPS + 4])
    if architecture == "albef":
        stored, loaded = (state(CheckpointStore(folder, ALONE).newest_valid()) for folder in (saved, tmp_path))
        assert [name for name, tensor in stored.items() if not torch.equal(tensor, loaded[name])] == []


@pytest.mark.parametrize(
    ("architecture", "layout"), [(name, layout) for name in GLOBAL for layout in ARCHITECTURES[name].layouts]
)
def test_with_negatives_of_the_global_batch_accumulation_is_the_whole_batch(request, whole_batch, architecture, layout):
    ranks, changes = LAYOUTS[layout]
    accumulation = 2 if ranks == "four_ranks" else 4
    own = ARCHITECTURES[architecture].changes
    config = tiny_config(training__accumulation=accumulation, **own, **GLOBAL_NEGATIVES, **changes)
    for curve in request.getfixturevalue(ranks).run(engine_curve, config, FEWER_STEPS):
        assert_same_curve(curve, whole_batch[architecture])


def evaluated(mesh, changes):
    config = case("albef", **changes)
    engine, dp = tiny_engine(mesh, config), mesh_of(mesh, config).dp
    batches = [made_up_batch(config, VOCABULARY, torch.arange(8) + 8 * (dp.rank + 2 * number)) for number in range(2)]
    return dp.rank, engine.run(WANTED, batches)


@pytest.mark.parametrize("layout", ["ZeRO-3 x dp 2", "ZeRO-1 x tp 2", "ZeRO-0 x pp 2", "ZeRO-1 x pp 2 x dp 2"])
def test_it_evaluates_its_own_model_and_every_rank_gets_the_figures(request, layout):
    ranks, changes = LAYOUTS[layout]
    model = build(case("albef"))
    for dp_rank, results in request.getfixturevalue(ranks).run(evaluated, changes):
        for number, result in enumerate(results):
            batch = made_up_batch(tiny_config(), VOCABULARY, torch.arange(8) + 8 * (dp_rank + 2 * number))
            for name, expected in model.run(WANTED, batch).items():
                torch.testing.assert_close(result[name], expected.detach(), rtol=1e-4, atol=1e-5, msg=name)
