"""Matrices cut over ranks take the very steps of one process: with every ZeRO stage, with data parallelism, in fp32.

Same global batch, accumulation 2, hard negatives in pools, all three objectives, clipping that bites.
"""

import pytest
import torch

from distributed.test_zero_equals_one_process import assert_same_curve
from distributed.tiny import engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.errors import ConfigError

STEPS = 10
DUAL_ENCODER = {
    "model__architecture": "dual_encoder",
    "model__fusion": None,
    "objectives__matching": None,
    "objectives__masked_lm": None,
}


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(), STEPS)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_that_share_every_block_equal_one_process(two_ranks, reference, stage):
    for curve in two_ranks.run(engine_curve, tiny_config(engine__zero_stage=stage, engine__tensor_parallel=2), STEPS):
        assert_same_curve(curve, reference)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_tensor_times_data_parallel_equals_one_process(four_ranks, reference, stage):
    for curve in four_ranks.run(engine_curve, tiny_config(engine__zero_stage=stage, engine__tensor_parallel=2), STEPS):
        assert_same_curve(curve, reference)


def test_activation_checkpointing_changes_no_number(two_ranks, reference):
    config = tiny_config(engine__zero_stage=3, engine__tensor_parallel=2, engine__activation_checkpointing=True)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


def test_the_dual_encoder_too(four_ranks):
    reference = plain_curve(tiny_config(**DUAL_ENCODER), STEPS)
    config = tiny_config(engine__zero_stage=3, engine__tensor_parallel=2, **DUAL_ENCODER)
    assert_same_curve(four_ranks.run(engine_curve, config, STEPS)[0], reference)


def test_four_ranks_that_share_every_block_equal_one_process(four_ranks):
    heads = {f"model__{tower}__heads": 4 for tower in ("image", "text", "fusion")}
    config = tiny_config(engine__zero_stage=1, engine__tensor_parallel=4, **heads)
    assert_same_curve(four_ranks.run(engine_curve, config, STEPS)[0], plain_curve(config, STEPS))


def held(mesh, config):
    engine = tiny_engine(mesh, config)
    return {fragment.name: (fragment.part.shape, fragment.part.size) for fragment in engine.fragments()}


def test_each_rank_holds_its_share_of_the_large_matrices(two_ranks):
    for parts in two_ranks.run(held, tiny_config(engine__zero_stage=0, engine__tensor_parallel=2)):
        cut = {name for name, (shape, size) in parts.items() if shape != size}
        matrices = {name for name, (shape, _) in parts.items() if len(shape) == 2}
        whole = {"image_embed.project.weight", "image_embed.position", "text_embed.position"}
        whole |= {"align.image_project.weight", "align.text_project.weight"}
        whole |= {"matching_head.classify.weight", "masked_lm_head.transform.weight"}
        assert matrices - cut == whole
        for shape, size in map(parts.get, cut):  # the vocabulary of 61 is cut into 31 and 30
            assert torch.Size(size).numel() == pytest.approx(torch.Size(shape).numel() / 2, abs=32)


def test_heads_that_cannot_be_shared_are_refused_with_both_keys():
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel 3 does not divide model\.image\.heads 2"):
        tiny_config(engine__tensor_parallel=3)
