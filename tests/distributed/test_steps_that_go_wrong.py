"""A step that goes wrong on one rank costs that step on all of them, and nothing else."""

import pytest
import torch

from distributed.tiny import ARCHITECTURES, engine_curve, mesh_of, micro_batches, tiny_config, tiny_engine
from pretrain.errors import TrainingError

ENGINES = [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)]  # (ZeRO stage, pipeline stages)


def poisoned_curve(mesh, stage, pp):
    """Five steps, of which the third meets a not-a-number on the last rank; also the weights around it."""
    config = tiny_config(engine__zero_stage=stage, engine__pipeline_parallel=pp)
    engine = tiny_engine(mesh, config)
    before = engine_curve(mesh, config, 2, engine)
    weights = [fragment.tensors["master"].clone() for fragment in engine.fragments()]
    handle = _poison(engine) if mesh.world.rank == mesh.world.size - 1 else None
    dp = mesh_of(mesh, config).dp
    skipped = engine.step(micro_batches(2, config, dp.rank, dp.size), 1e-3)
    if handle:
        handle.remove()
    unchanged = all(
        torch.equal(weight, fragment.tensors["master"])
        for weight, fragment in zip(weights, engine.fragments(), strict=True)
    )
    return before, (skipped.applied, engine.applied_steps, unchanged), engine_curve(mesh, config, 2, engine, first=3)


def _poison(engine):
    return engine.model.matching_loss.register_forward_hook(
        lambda module, inputs, made: (made[0] + float("inf"), made[1])  # gradients stay finite
    )


@pytest.mark.parametrize(("stage", "pp"), ENGINES)
def test_the_step_is_skipped_on_all_ranks_and_leaves_no_trace(two_ranks, stage, pp):
    results = two_ranks.run(poisoned_curve, stage, pp)
    reference = two_ranks.run(curve_without_third_step, stage, pp)
    for (before, skipped, after), expected in zip(results, reference, strict=True):
        assert skipped == (False, 2, True)
        assert before + after == expected


def curve_without_third_step(mesh, stage, pp):
    config = tiny_config(engine__zero_stage=stage, engine__pipeline_parallel=pp)
    engine = tiny_engine(mesh, config)
    return engine_curve(mesh, config, 2, engine) + engine_curve(mesh, config, 2, engine, first=3)


def limited_curve(mesh, stage, pp, limit):
    """Four steps, the third with a limit; what that step said, and whether it changed a weight."""
    config = tiny_config(engine__zero_stage=stage, engine__pipeline_parallel=pp)
    engine, dp = tiny_engine(mesh, config), mesh_of(mesh, config).dp
    before = engine_curve(mesh, config, 2, engine)
    weights = [fragment.tensors["master"].clone() for fragment in engine.fragments()]
    result = engine.step(micro_batches(2, config, dp.rank, dp.size), 1e-3, limit)
    unchanged = all(torch.equal(w, f.tensors["master"]) for w, f in zip(weights, engine.fragments(), strict=True))
    loss = sum(result.losses.values())  # each weighs 1
    return loss, result.applied, unchanged, before + engine_curve(mesh, config, 1, engine, first=3)


@pytest.mark.parametrize(("stage", "pp"), ENGINES)
def test_a_loss_above_its_limit_skips_the_step_on_all_ranks_and_is_still_reported(two_ranks, stage, pp):
    """The limit is for the mean over ranks and micro-batches, of which some are below it."""
    unlimited = two_ranks.run(limited_curve, stage, pp, float("inf"))
    loss = unlimited[0][0]
    below = two_ranks.run(limited_curve, stage, pp, loss * 1.0001)
    assert [result[:3] for result in below] == [(loss, True, False)] * 2
    assert below == unlimited
    above = two_ranks.run(limited_curve, stage, pp, loss * 0.9999)
    assert [result[:3] for result in above] == [(loss, False, True)] * 2
    assert [result[3] for result in above] != [result[3] for result in below]


def leave_out_the_head(engine, calls=()):
    """The masked-LM head has no part in its loss any more, or not in these calls of the coming ones."""
    if not hasattr(engine.model, "masked_lm_head"):  # on another stage
        return
    right, made = engine.model.masked_lm_head.forward, []

    def forward(tokens, *others):
        made.append(None)
        if calls and len(made) not in calls:
            return right(tokens, *others)
        return tokens.sum() * 0, torch.zeros(2, dtype=torch.int64)

    engine.model.masked_lm_head.forward = forward


def told_of_unused(mesh, stage, pp, on_ranks):
    config = tiny_config(engine__zero_stage=stage, engine__pipeline_parallel=pp, training__debug=True)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 2, engine)
    if mesh.world.rank in on_ranks:
        leave_out_the_head(engine)
    try:
        engine_curve(mesh, config, 1, engine, first=2)
    except TrainingError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("stage", "pp", "on_ranks"),
    # On one rank alone, DeepSpeed's ranks would reduce unlike numbers of gradients, and fail there.
    [(0, 1, [1]), *((stage, pp, [0, 1]) for stage, pp in ENGINES)],
)
def test_with_debug_a_layer_that_did_not_run_is_told_on_all_ranks(two_ranks, stage, pp, on_ranks):
    assert two_ranks.run(told_of_unused, stage, pp, []) == [None, None]
    for said in two_ranks.run(told_of_unused, stage, pp, on_ranks):
        assert said.startswith("8 trainable parameters had no gradient in this step, masked_lm_head.decode.bias first:")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_every_architecture_has_a_gradient(one_rank, architecture):
    config = tiny_config(engine__zero_stage=0, training__debug=True, **ARCHITECTURES[architecture].changes)
    assert len(one_rank.run(engine_curve, config, 2)[0]) == 2


def moments_of_an_unused_layer(mesh, stage, pp):
    """This rank's part of a layer's moments before and after a step that leaves it out."""
    config = tiny_config(engine__zero_stage=stage, engine__pipeline_parallel=pp)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine)
    views = [f.tensors for f in engine.fragments() if f.name.startswith("masked_lm_head")]
    before = [{kind: tensor.clone() for kind, tensor in view.items()} for view in views]
    leave_out_the_head(engine)
    engine_curve(mesh, config, 1, engine, first=1)
    return list(zip(before, views, strict=True)), config.optimizer.betas


@pytest.mark.parametrize(("stage", "pp"), ENGINES)
def test_the_moments_of_a_layer_that_did_not_run_fade_as_with_a_gradient_of_zero(two_ranks, stage, pp):
    compared = 0
    for pieces, betas in two_ranks.run(moments_of_an_unused_layer, stage, pp):
        for before, after in pieces:
            for kind, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
                torch.testing.assert_close(after[kind], before[kind] * beta, rtol=1e-6, atol=0)
                compared += int(before[kind].count_nonzero())
    assert compared > 1000


def norms_with_a_part_left_out(mesh, stage, calls):
    """Gradient norms of three steps of two micro-batches, where the head has no part in some passes."""
    config = tiny_config(engine__zero_stage=stage)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine)
    leave_out_the_head(engine, calls)
    return [point.norm for point in engine_curve(mesh, config, 3, engine, first=1)]


@pytest.mark.parametrize("calls", [(1, 2), (1,), (2,), (4, 5)])
def test_no_stage_takes_a_gradient_of_another_micro_batch_for_one_that_is_missing(two_ranks, calls):
    expected = two_ranks.run(norms_with_a_part_left_out, 0, calls)
    for stage in (1, 2, 3):
        for norms, reference in zip(two_ranks.run(norms_with_a_part_left_out, stage, calls), expected, strict=True):
            assert norms == pytest.approx(reference, rel=1e-4)


def move_of_an_unused_layer(mesh, stage):
    """How far this rank's part of a layer moves in a step that leaves it out, moments and weight decay off."""
    config = tiny_config(engine__zero_stage=stage, optimizer__weight_decay=0.0, optimizer__betas=[0.0, 0.0])
    engine = tiny_engine(mesh, config)
    views = [f.tensors["master"] for f in engine.fragments() if f.name.startswith("masked_lm_head")]
    start = [view.clone() for view in views]
    engine_curve(mesh, config, 1, engine)
    used = [view.clone() for view in views]
    leave_out_the_head(engine)
    engine_curve(mesh, config, 1, engine, first=1)
    return [
        sum(float((a - b).abs().sum()) for a, b in zip(*pair, strict=True)) for pair in ((start, used), (used, views))
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_without_gradient_stays_where_it_is(two_ranks, stage):
    """Stage 3 of DeepSpeed would apply its last gradient again."""
    moved = two_ranks.run(move_of_an_unused_layer, stage)
    assert sum(used for used, _ in moved) > 0
    assert [unused for _, unused in moved] == [0.0, 0.0]
