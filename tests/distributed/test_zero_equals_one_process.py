"""What ZeRO offers besides its stages changes no number: recomputed activations, state in host memory."""

import pytest

from distributed.tiny import assert_same_curve, engine_curve, plain_curve, tiny_config

STEPS = 6


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(), STEPS)


def test_activation_checkpointing_changes_no_number(two_ranks, reference):
    config = tiny_config(engine__zero_stage=3, engine__activation_checkpointing=True)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


def test_offload_changes_no_number(two_ranks, reference):
    for stage in (2, 3):
        config = tiny_config(engine__zero_stage=stage, engine__offload="cpu")
        assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)
