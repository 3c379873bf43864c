"""ZeRO 0-3 on 1, 2 or 4 ranks take the very steps that plain PyTorch takes in one process.

Same global batch, accumulation 2, hard negatives in pools, all three objectives, clipping that bites, fp32.
"""

import pytest

from distributed.tiny import engine_curve, plain_curve, tiny_config

STEPS = 10


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(), STEPS)


def assert_same_curve(curve, reference):
    for (losses, norm), (expected_losses, expected_norm) in zip(curve, reference, strict=True):
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_the_reference_learns_and_is_clipped(reference):
    assert sum(reference[-1][0]) < sum(reference[0][0])
    assert all(norm > tiny_config().optimizer.clip for _, norm in reference)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_alone_equals_plain_pytorch(one_rank, reference, stage):
    assert_same_curve(one_rank.run(engine_curve, tiny_config(engine__zero_stage=stage), STEPS)[0], reference)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_plain_pytorch(two_ranks, reference, stage):
    for curve in two_ranks.run(engine_curve, tiny_config(engine__zero_stage=stage), STEPS):
        assert_same_curve(curve, reference)


def test_four_ranks_equal_plain_pytorch(four_ranks, reference):
    for curve in four_ranks.run(engine_curve, tiny_config(engine__zero_stage=3), STEPS):
        assert_same_curve(curve, reference)


def test_activation_checkpointing_changes_no_number(two_ranks, reference):
    config = tiny_config(engine__zero_stage=3, engine__activation_checkpointing=True)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


def test_offload_changes_no_number(two_ranks, reference):
    for stage in (2, 3):
        config = tiny_config(engine__zero_stage=stage, engine__offload="cpu")
        assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


def test_the_dual_encoder_too(two_ranks):
    changes = {
        "model__architecture": "dual_encoder",
        "model__fusion": None,
        "objectives__matching": None,
        "objectives__masked_lm": None,
    }
    reference = plain_curve(tiny_config(**changes), STEPS)
    for stage in (0, 3):
        curve = two_ranks.run(engine_curve, tiny_config(engine__zero_stage=stage, **changes), STEPS)[0]
        assert_same_curve(curve, reference)
