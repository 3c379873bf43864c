"""With `negatives: global_batch`, accumulation changes nothing: the steps are those of one whole batch at once."""

import pytest

from distributed.tiny import (
    CLIP,
    GLOBAL_NEGATIVES,
    assert_same_curve,
    engine_curve,
    plain_curve,
    tiny_config,
)

STEPS = 10


@pytest.fixture(scope="module")
def whole():
    """Plain PyTorch on the whole batch at once, which needs no second pass."""
    return plain_curve(tiny_config(training__accumulation=1), STEPS)


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (0, 2), (2, 2), (3, 1), (3, 2)])
def test_fewer_micro_steps_are_the_whole_batch_too(two_ranks, whole, stage, accumulation):
    config = tiny_config(engine__zero_stage=stage, training__accumulation=accumulation, **GLOBAL_NEGATIVES)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, whole)


def test_more_micro_steps_are_the_whole_batch_too(one_rank, whole):
    config = tiny_config(engine__zero_stage=3, training__accumulation=8, **GLOBAL_NEGATIVES)
    assert_same_curve(one_rank.run(engine_curve, config, STEPS)[0], whole)


def test_activation_checkpointing_changes_no_number(four_ranks, whole):
    config = tiny_config(
        engine__zero_stage=1, engine__tensor_parallel=2, engine__activation_checkpointing=True, **GLOBAL_NEGATIVES
    )
    assert_same_curve(four_ranks.run(engine_curve, config, STEPS)[0], whole)


def test_clip_too(two_ranks):
    whole = plain_curve(tiny_config(training__accumulation=1, **CLIP), STEPS)
    config = tiny_config(engine__zero_stage=2, training__accumulation=4, **GLOBAL_NEGATIVES, **CLIP)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], whole)


def test_without_it_accumulation_changes_what_is_optimised(whole):
    (first,) = plain_curve(tiny_config(training__accumulation=4), 1)
    assert first.losses["contrastive"] < whole[0].losses["contrastive"] - 1  # fewer negatives are easier
