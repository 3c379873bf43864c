"""Every layout takes the very steps that plain PyTorch takes in one process.

Over ten steps in fp32, losses to 1e-5, gradient norms to 1e-4, right answers exactly: one global batch, one matching
pool, all objectives of the architecture, clipping that bites. What one process saved, every layout loads, saves again
to the bit, and goes on from; and it evaluates its own model.
"""

import re
from pathlib import Path
from typing import NamedTuple

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
from pretrain.parallel.tensor import Part, whole
from pretrain.synthetic import made_up_batch

STEPS, FEWER_STEPS = 10, 6
GLOBAL = ("albef", "blip", "coca")  # those that contrast a global batch, with more than that to do
README = Path(__file__).parents[2] / "README.md"
KINDS = ("master", "exp_avg", "exp_avg_sq")
RANKS = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}
WANTED = ("image_embeddings", "match_logits", "counts/masked_lm")


def case(architecture, **changes):
    return tiny_config(training__accumulation=2, **ARCHITECTURES[architecture].changes, **changes)


class Held(NamedTuple):
    """A fragment, but for its values."""

    name: str
    part: Part
    start: int
    length: int


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


@pytest.fixture(scope="module")
def seen() -> dict:
    """What each rank held in the layouts so far, each sort once, and what they saved."""
    return {}


def save(mesh, folder):
    engine = tiny_engine(mesh, config := case("albef", engine__zero_stage=0))
    engine_curve(mesh, config, 4, engine)
    commit(CheckpointStore(folder, mesh.world), 4, engine)


def examine(mesh, architecture, changes, saved, again) -> tuple[list[Point], list[Held]]:
    """The steps of one architecture on a layout, and then those after what one process saved; what this rank holds."""
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
    return curve, [Held(f.name, f.part, f.start, f.stop - f.start) for f in engine.fragments()]


def differences(folder, held, whole_state) -> list[str]:
    """What a rank that holds these pieces reads otherwise from a checkpoint than it stands in the whole state."""
    wanted = [
        Fragment(name, part, start, {kind: torch.full((length,), torch.nan) for kind in KINDS})
        for name, part, start, length in held
    ]
    read_fragments(CheckpointStore(folder, ALONE).newest_valid(), wanted)
    found = []
    for fragment in wanted:
        cut = tuple(slice(a, a + n) for a, n in zip(fragment.part.offset, fragment.part.size, strict=True))
        for kind, tensor in fragment.tensors.items():
            expected = whole_state[f"{kind}/{fragment.name}"].view(fragment.part.shape)[cut]
            if not torch.equal(tensor, expected.flatten()[fragment.start : fragment.stop]):
                found.append(f"{kind}/{fragment.name}")
    return found


def state(folder) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole."""
    found = {}
    for name, parameter in build(case("albef")).named_parameters():
        kinds = {kind: torch.empty(parameter.numel()) for kind in KINDS}
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
def test_its_steps_are_those_of_one_process(request, references, saved, seen, tmp_path, architecture, layout):
    ranks, changes = LAYOUTS[layout]
    results = request.getfixturevalue(ranks).run(examine, architecture, changes, saved, tmp_path)
    for curve, _ in results:
        assert_same_curve(curve[:STEPS], references[architecture])
        assert_same_curve(curve[STEPS:], references[architecture][4 : len(curve) - STEPS + 4])
    if architecture == "albef":
        stored, loaded = (state(CheckpointStore(folder, ALONE).newest_valid()) for folder in (saved, tmp_path))
        assert [name for name, tensor in stored.items() if not torch.equal(tensor, loaded[name])] == []
        # What this layout saved, each other sort of layout so far reads, and the other way round.
        holdings = tuple(tuple(held) for _, held in results)
        for others, folder in seen.items():
            assert [differences(tmp_path, held, stored) for held in others if held] == [[] for held in others if held]
            assert [differences(folder, held, stored) for held in holdings if held] == [[] for held in holdings if held]
        seen[holdings] = tmp_path


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
