"""A loss or gradient that is not finite on one rank costs the step on all of them, and nothing else."""

import pytest
import torch

from distributed.tiny import engine_curve, mesh_of, micro_batches, tiny_config, tiny_engine


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


@pytest.mark.parametrize(("stage", "pp"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)])
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


def move_of_an_unused_layer(mesh, stage):
    """How far this rank's part of a layer moves in a step that leaves it out, moments and weight decay off."""
    config = tiny_config(engine__zero_stage=stage, optimizer__weight_decay=0.0, optimizer__betas=[0.0, 0.0])
    engine = tiny_engine(mesh, config)
    views = [f.tensors["master"] for f in engine.fragments() if f.name.startswith("masked_lm_head")]
    start = [view.clone() for view in views]
    engine_curve(mesh, config, 1, engine)
    used = [view.clone() for view in views]
    engine.model.masked_lm_head.forward = lambda tokens, *_: (tokens.sum() * 0, torch.zeros(2, dtype=torch.int64))
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
