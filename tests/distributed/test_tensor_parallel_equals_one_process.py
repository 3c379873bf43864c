"""Matrices cut over ranks: each holds its share, and what else is switched on changes no number."""

import pytest
import torch

from distributed.tiny import assert_same_curve, engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.errors import ConfigError

STEPS = 6


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(), STEPS)


def test_activation_checkpointing_changes_no_number(two_ranks, reference):
    config = tiny_config(engine__zero_stage=3, engine__tensor_parallel=2, engine__activation_checkpointing=True)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


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
        whole |= {"image_project.project.weight", "text_project.project.weight"}
        whole |= {"matching_head.classify.weight", "masked_lm_head.transform.weight"}
        assert matrices - cut == whole
        for shape, size in map(parts.get, cut):  # the vocabulary of 61 is cut into 31 and 30
            assert torch.Size(size).numel() == pytest.approx(torch.Size(shape).numel() / 2, abs=32)


def test_heads_that_cannot_be_shared_are_refused_with_both_keys():
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel 3 does not divide model\.image\.heads 2"):
        tiny_config(engine__tensor_parallel=3)
