"""A pipeline, plain and on DeepSpeed: what is switched on changes no number, and stages hold their layers alone."""

from unittest import mock

import pytest
import torch

from distributed.tiny import (
    CLIP,
    GLOBAL_NEGATIVES,
    VOCABULARY,
    assert_same_curve,
    build,
    engine_curve,
    mesh_of,
    micro_batches,
    plain_curve,
    tiny_config,
    tiny_engine,
)
from pretrain.accounting.stages import cut_into_stages
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of

STEPS = 6


def pipeline(stages, zero_stage, **changes):
    return tiny_config(engine__pipeline_parallel=stages, engine__zero_stage=zero_stage, **changes)


@pytest.fixture(scope="module")
def reference():
    return plain_curve(tiny_config(), STEPS)


def test_activation_checkpointing_changes_no_number(two_ranks, reference):
    config = pipeline(2, 1, engine__activation_checkpointing=True)
    assert_same_curve(two_ranks.run(engine_curve, config, STEPS)[0], reference)


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_negatives_of_the_global_batch_accumulation_changes_nothing(two_ranks, zero_stage, accumulation):
    config = pipeline(2, zero_stage, training__accumulation=accumulation, **GLOBAL_NEGATIVES, **CLIP)
    reference = plain_curve(tiny_config(training__accumulation=1, **CLIP), STEPS)
    for curve in two_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, reference)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_matching_pools_that_lie_on_several_ranks(four_ranks, zero_stage):
    """The stage that pairs up fetches negatives from the same stage of other pipelines."""
    config = pipeline(2, zero_stage, objectives__matching__pool=16)
    for curve in four_ranks.run(engine_curve, config, STEPS):
        assert_same_curve(curve, plain_curve(config, STEPS))


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bf16_follows_fp32(four_ranks, reference, zero_stage):
    """With ZeRO-1 another of DeepSpeed's optimizers takes the norm over stages and tensor-parallel ranks."""
    config = pipeline(2, zero_stage, engine__tensor_parallel=2, engine__precision="bf16")
    for curve in four_ranks.run(engine_curve, config, 6):
        for here, expected in zip(curve, reference, strict=False):
            assert here.losses == pytest.approx(expected.losses, rel=0.05)
            assert here.norm == pytest.approx(expected.norm, rel=0.05)


def first_operations(mesh, config):
    """What a rank says on the axis of its pipeline while the engine is built."""
    said = []
    pp = mesh_of(mesh, config).pp
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
        tiny_engine(mesh, config)
        said += [call for call in all_reduce.call_args_list if call.kwargs.get("group") is pp.group]
    return len(said)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_all_ranks_of_a_pipeline_take_part_in_its_first_operation(four_ranks, zero_stage):
    """Else NCCL waits for ever where a pass leaves out the stages behind the last one that it needs."""
    assert min(four_ranks.run(first_operations, pipeline(4, zero_stage, engine__tensor_parallel=1))) > 0


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_pipeline_that_fills_equals_one_process(four_ranks, zero_stage):
    """Twice as many micro-batches as stages: forward and backward passes take turns."""
    config = pipeline(4, zero_stage, training__accumulation=8)
    curve = four_ranks.run(engine_curve, config, 2)[0]
    assert_same_curve(curve, plain_curve(config, 2))


def evaluated(mesh, config):
    """What an evaluation says on every rank, in the midst of training."""
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine)
    dp = mesh_of(mesh, config).dp
    want = ["loss/contrastive", "counts/masked_lm", "image_embeddings", "match_logits"]
    results = engine.run(want, micro_batches(7, config, dp.rank, dp.size))
    engine_curve(mesh, config, 1, engine, first=1)  # and training goes on
    return results


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_every_stage_gets_what_an_evaluation_says(one_rank, two_ranks, zero_stage):
    expected = one_rank.run(evaluated, tiny_config(engine__zero_stage=0))[0]
    for results in two_ranks.run(evaluated, pipeline(2, zero_stage)):
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


def test_more_stages_than_layers_are_refused():
    config = pipeline(40, 1)
    with pytest.raises(ConfigError, match=r"pipeline_parallel 40 is more than the \d+ layers of the model: set it to"):
        cut_into_stages(config, VOCABULARY, architecture_of(config, VOCABULARY), 40)


def stage_names(mesh, config):
    return {fragment.name.partition(".")[0] for fragment in tiny_engine(mesh, config).fragments()}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_each_rank_holds_the_layers_of_its_stage_alone(two_ranks, zero_stage):
    config = pipeline(2, zero_stage)
    architecture = architecture_of(config, VOCABULARY)
    cut = [{layer.name for layer in part} for part in cut_into_stages(config, VOCABULARY, architecture, 2)]
    held = two_ranks.run(stage_names, config)
    assert [names <= part for names, part in zip(held, cut, strict=True)] == [True, True]
    assert held[0] | held[1] == {name.partition(".")[0] for name, _ in build(config).named_parameters()}
