"""A rank holds its share of 16 bytes per parameter under ZeRO-3, and gathers a layer once forward and once backward.

Everything that the engine made and kept is counted, in mixed precision; the model is 6 M parameters in large matrices.
"""

import pytest

from benchmarks.scaling import NO_LOOKAHEAD, count_gathers, measure_state, settings, wide_config
from distributed.tiny import engine_curve, tiny_config

LAYERS = {"image_embed", "image_block_0", "text_block_0", "fusion_block_0", "masked_lm_head"}  # those with matrices
BLOCKS = {"image_block_0", "text_block_0", "fusion_block_0"}


def gathers(mesh, config, changes):
    with settings(**changes):
        return count_gathers(mesh, config)


def curve(mesh, config, changes):
    with settings(**changes):
        return engine_curve(mesh, config, 6)


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks", "four_ranks"])
def test_ranks_hold_together_16_bytes_a_parameter(request, ranks):
    for held in request.getfixturevalue(ranks).run(measure_state, wide_config(precision="bf16")):
        assert sum(held.values()) == pytest.approx(16, rel=0.05)
        assert held["bfloat16"] == pytest.approx(2 + 2, rel=0.05)  # weights, gradients
        assert held["float32"] == pytest.approx(4 + 4 + 4, rel=0.01)  # master weights, two moments


def test_gradients_that_add_up_over_micro_steps_are_in_fp32_and_take_2_bytes_more(two_ranks):
    for held in two_ranks.run(measure_state, wide_config(accumulation=2, precision="bf16")):
        assert sum(held.values()) == pytest.approx(18, rel=0.02)


def test_a_single_micro_steps_gradients_are_the_same_in_both_types(two_ranks):
    config = tiny_config(engine__zero_stage=3, engine__precision="bf16", training__accumulation=1)
    in_fp32, in_bf16 = (two_ranks.run(curve, config, {"gradients": kind})[0] for kind in ("fp32", "bf16"))
    assert in_fp32 == in_bf16


@pytest.mark.parametrize(("ranks", "accumulation"), [("two_ranks", 1), ("two_ranks", 2), ("four_ranks", 1)])
def test_a_layer_is_gathered_once_forward_and_once_backward_a_micro_step(request, ranks, accumulation):
    config = wide_config(accumulation, precision="fp32")
    for by_layer, travelled in request.getfixturevalue(ranks).run(gathers, config, NO_LOOKAHEAD):
        assert by_layer == {layer: {(1, 1)} for layer in LAYERS}
        assert travelled == pytest.approx(2, rel=1e-3)


def test_a_model_within_the_configured_reuse_distance_is_gathered_once(two_ranks):
    by_layer, travelled = two_ranks.run(gathers, wide_config(precision="fp32"), {})[0]
    assert by_layer == {layer: {(1, 0)} for layer in LAYERS}
    assert travelled == pytest.approx(1, rel=1e-3)


def test_recomputed_activations_gather_a_block_again_only_without_any_reuse(two_ranks):
    config = wide_config(precision="fp32", activation_checkpointing=True)
    by_layer, _ = two_ranks.run(gathers, config, NO_LOOKAHEAD)[0]
    # Recomputing stops when all is there that the backward pass needs, which is before the last matrix.
    assert by_layer == {layer: {(1, 1), (2, 1)} if layer in BLOCKS else {(1, 1)} for layer in LAYERS}
    scaled = {  # as the configured ones to a model of two billions
        "stage3_max_reuse_distance": 3_000_000,
        "stage3_max_live_parameters": 3_000_000,
        "stage3_prefetch_bucket_size": 150_000,
    }
    by_layer, travelled = two_ranks.run(gathers, config, scaled)[0]
    assert all(sum(times) <= 2 for layer in by_layer.values() for times in layer)
    assert travelled <= 2
