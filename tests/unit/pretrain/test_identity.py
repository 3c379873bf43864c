"""A checkpoint that belongs to another model, seed or tokenizer is refused by the first thing that differs."""

import pytest

from distributed.tiny import CLIP, tiny_config
from pretrain.checkpoint.identity import check_same_run
from pretrain.errors import CheckpointError


def resume(saved, here, tokenizer="t"):
    check_same_run({"config": saved.model_dump(mode="json"), "tokenizer": "t"}, here, tokenizer, "step-1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0 in it and 1 in the config"),
        ({"model__embed": 8}, "model.embed is 16 in it and 8 in the config"),
        ({"objectives__masked_lm": None}, "objectives.masked_lm is on in it and off in the config"),
        (
            {"objectives__contrastive__loss": "sigmoid"},
            "objectives.contrastive.loss is softmax in it and sigmoid in the config",
        ),
        (CLIP, "model.architecture is albef in it and clip in the config"),
    ],
)
def test_another_model_is_refused_with_key_and_both_values(changes, message):
    with pytest.raises(CheckpointError, match=message):
        resume(tiny_config(), tiny_config(**changes))


def test_another_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match="another tokenizer than unused"):
        resume(tiny_config(), tiny_config(), tokenizer="u")


def test_layout_batch_and_weights_may_change():
    here = tiny_config(
        engine__zero_stage=1,
        engine__pipeline_parallel=2,
        training__global_batch=64,
        training__accumulation=1,
        objectives__matching__pool=16,
        objectives__contrastive__weight=2.0,
        objectives__contrastive__negatives="global_batch",
    )
    resume(tiny_config(), here)
