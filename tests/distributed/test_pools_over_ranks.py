"""A pool of hard negatives may lie on several ranks: they find the negatives of one process, and take its steps.

Grains of 4 samples, pools of 16 or 32, so that every pool lies on all ranks; all three objectives, fp32.
"""

import pytest
import torch

from distributed.test_zero_equals_one_process import assert_same_curve
from distributed.tiny import engine_curve, mesh_of, micro_batches, plain_curve, tiny_config
from pretrain.collectives import fetch, find_route
from pretrain.models.architectures import layer_specs
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor import build_part

STEPS = 10
G, N = 16, 5  # rows on all ranks, rows that each asks for


def pool_config(pool, **changes):
    return tiny_config(**{"objectives__matching__pool": pool, "training__accumulation": 1, **changes})


@pytest.fixture(scope="module")
def curves():
    return {pool: plain_curve(pool_config(pool), STEPS) for pool in (16, 32)}


@pytest.mark.parametrize("pool", [16, 32])
@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks", "four_ranks"])
def test_any_number_of_ranks_equals_one_process(request, curves, ranks, pool):
    for curve in request.getfixturevalue(ranks).run(engine_curve, pool_config(pool, engine__zero_stage=0), STEPS):
        assert_same_curve(curve, curves[pool])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_equals_one_process(two_ranks, curves, stage):
    config = pool_config(16, engine__zero_stage=stage, engine__activation_checkpointing=stage == 3)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, curves[16])


def test_accumulation_with_negatives_of_the_global_batch_equals_one_process(two_ranks, curves):
    config = pool_config(16, training__accumulation=2, objectives__contrastive__negatives="global_batch")
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, curves[16])


def test_a_group_that_is_part_of_the_world_equals_one_process(four_ranks, curves):
    for curve in four_ranks.run(engine_curve, pool_config(32, engine__tensor_parallel=2), STEPS):
        assert_same_curve(curve, curves[32])


def test_without_masked_lm_the_fetched_captions_are_found_too(two_ranks):
    config = pool_config(32, objectives__masked_lm=None)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, plain_curve(config, STEPS))
