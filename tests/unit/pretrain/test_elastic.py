"""A run that goes on with another number of ranks: which accumulation it takes, and which numbers it refuses."""

import json

import pytest
import torch

from pretrain.config import parse_config
from pretrain.elastic import adapt
from pretrain.errors import ConfigError
from pretrain.parallel.mesh import Axis, Mesh


def config(tmp_path, accumulation=1, negatives="global_batch", batch=192, **matching):
    tree = {
        "output": str(tmp_path),
        "data": {"train": "manifest.json", "tokenizer": "tokenizer.model", "grain": 16},
        "model": {"size": "tiny"},
        "objectives": {"contrastive": {"negatives": negatives}, "matching": matching or None},
        "training": {"steps": 10, "global_batch": batch, "accumulation": accumulation},
    }
    return parse_config(tree, "test")


def mesh(ranks: int, tp: int = 1) -> Mesh:
    return Mesh(torch.device("cpu"), world=Axis(0, ranks, None), dp=Axis(0, ranks // tp, None))


def saved(tmp_path, elastic) -> None:
    folder = tmp_path / "checkpoints" / "step-000000004"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"elastic": elastic} if elastic else {}))


@pytest.mark.parametrize(
    ("begun_with", "ranks", "accumulation"),
    [
        ((1, 4), 4, 1),
        ((1, 4), 2, 2),
        ((1, 4), 1, 4),
        ((1, 2), 4, 1),
        ((2, 2), 4, 1),
        ((1, 6), 4, 3),  # 48 samples per rank would be more than the 32 before, and 2 micro-steps do not divide
        ((1, 3), 4, 1),
    ],
)
def test_a_rank_never_holds_more_samples_than_before_in_as_few_micro_steps_as_that_takes(
    tmp_path, begun_with, ranks, accumulation
):
    asked, before = begun_with
    fresh, elastic = adapt(config(tmp_path, asked), mesh(before))
    assert fresh.training.accumulation == asked
    saved(tmp_path, elastic)
    again, elastic = adapt(config(tmp_path, asked), mesh(ranks))
    assert again.training.accumulation == accumulation
    saved(tmp_path, elastic)
    back, _ = adapt(config(tmp_path, asked), mesh(before))
    assert back.training.accumulation == asked


@pytest.mark.parametrize(
    ("changes", "elastic"),
    [
        ({"negatives": "micro_batch"}, {"accumulation": 1, "micro_batch_per_rank": 48}),  # part of the recipe
        ({"pool": 32}, {"accumulation": 1, "micro_batch_per_rank": 48}),  # of a micro-step
        ({}, {"accumulation": 4, "micro_batch_per_rank": 48}),  # the user has changed it
        ({}, None),  # of a version that did not write it down
    ],
)
def test_the_configs_accumulation_stays_where_it_is_part_of_the_recipe_or_the_users_own(tmp_path, changes, elastic):
    saved(tmp_path, elastic)
    assert adapt(config(tmp_path, **changes), mesh(2))[0].training.accumulation == 1


@pytest.mark.parametrize(
    ("asked", "negatives", "ranks", "tp", "possible"),
    [
        (1, "micro_batch", 5, 1, "1, 2, 3, 4, 6 or 12"),
        (2, "micro_batch", 4, 1, "1, 2, 3 or 6"),
        (2, "global_batch", 5, 1, "1, 2, 3, 4, 6 or 12"),
        (1, "micro_batch", 10, 2, "2, 4, 6, 8, 12 or 24"),
    ],
)
def test_a_number_of_ranks_that_does_not_divide_the_steps_is_refused_with_those_that_do(
    tmp_path, asked, negatives, ranks, tp, possible
):
    adapt(config(tmp_path, asked, negatives), mesh(ranks, tp))  # a fresh run is told by the data, with more fixes
    saved(tmp_path, {"accumulation": asked, "micro_batch_per_rank": 48})
    with pytest.raises(ConfigError, match=f"does not divide over {ranks} processes: use {possible} processes"):
        adapt(config(tmp_path, asked, negatives), mesh(ranks, tp))
