"""With `negatives: global_batch`, accumulation changes nothing: the steps are those of one whole batch at once."""

import pytest

from distributed.test_tensor_parallel_equals_one_process import DUAL_ENCODER
from distributed.test_zero_equals_one_process import assert_same_curve
from distributed.tiny import engine_curve, plain_curve, tiny_config

STEPS = 10
GLOBAL = {"objectives__contrastive__negatives": "global_batch"}


@pytest.fixture(scope="module")
def whole():
    """Plain PyTorch on the whole batch at once, which needs no second pass."""
    return plain_curve(tiny_config(training__accumulation=1), STEPS)


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 2), (0, 4), (1, 2), (2, 4), (3, 1), (3, 4)])
def test_accumulation_on_two_ranks_is_the_whole_batch(two_ranks, whole, stage, accumulation):
    config = tiny_config(engine__zero_stage=stage, training__accumulation=accumulation, **GLOBAL)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, whole)


def test_accumulation_alone_is_the_whole_batch(one_rank, whole):
    config = tiny_config(engine__zero_stage=3, training__accumulation=8, **GLOBAL)
    assert_same_curve(one_rank.run(engine_curve, config, STEPS)[0], whole)


def test_with_tensor_parallelism_and_checkpointing(four_ranks, whole):
    config = tiny_config(
        engine__zero_stage=3, engine__tensor_parallel=2, engine__activation_checkpointing=True, **GLOBAL
    )
    assert_same_curve(four_ranks.run(engine_curve, config, STEPS)[0], whole)


def test_the_dual_encoder_too(two_ranks):
    whole = plain_curve(tiny_config(training__accumulation=1, **DUAL_ENCODER), STEPS)
    config = tiny_config(engine__zero_stage=2, training__accumulation=4, **GLOBAL, **DUAL_ENCODER)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], whole)


def test_without_it_accumulation_changes_what_is_optimised(whole):
    (losses, _), *_ = plain_curve(tiny_config(training__accumulation=4), 1)
    assert losses[0] < whole[0][0][0] - 1  # fewer negatives are easier
