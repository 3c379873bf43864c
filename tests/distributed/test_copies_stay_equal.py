"""What every tensor-parallel rank holds a copy of stays the same on all of them, to the last bit."""

import pytest
import torch

from distributed.tiny import engine_curve, mesh_of, tiny_config, tiny_engine
from pretrain.parallel.copies import differing_copies

LAYOUTS = [
    ("two_ranks", {"engine__zero_stage": 0}),
    ("two_ranks", {"engine__zero_stage": 1}),
    ("two_ranks", {"engine__zero_stage": 2, "engine__offload": "cpu"}),
    ("two_ranks", {"engine__zero_stage": 3}),
    ("four_ranks", {"engine__zero_stage": 0}),
    ("four_ranks", {"engine__zero_stage": 2}),
    ("four_ranks", {"engine__zero_stage": 3}),
    ("four_ranks", {"engine__zero_stage": 3, "engine__offload": "cpu"}),
    ("four_ranks", {"engine__zero_stage": 0, "engine__pipeline_parallel": 2}),
    ("four_ranks", {"engine__zero_stage": 1, "engine__pipeline_parallel": 2}),
]


def copies_after_noise(mesh, changes, defended):
    """Trains while the second rank of each tp axis adds noise to gradients of copies; which copies differ then."""
    config = tiny_config(engine__tensor_parallel=2, **changes)
    engine = tiny_engine(mesh, config)
    if not defended:
        switch_off(engine)
    if mesh_of(mesh, config).tp.rank == 1:
        for name, parameter in engine.model.named_parameters():
            if not engine.parts[name].is_cut:
                parameter.register_hook(lambda gradient: gradient + 1e-7)
    curve = engine_curve(mesh, config, 3, engine)
    return [differing.name for differing in differing_copies(engine.fragments(), mesh.world)], curve


def switch_off(engine):
    if hasattr(engine, "copied"):
        engine.copied = engine.copied[:0]
    else:
        engine.optimizer.optimizer.average = None


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS)
def test_noise_in_one_copy_of_a_gradient_reaches_all_copies_alike(request, ranks, changes):
    results = request.getfixturevalue(ranks).run(copies_after_noise, changes, True)
    assert all(differing == [] for differing, _ in results)
    assert len({str(curve) for _, curve in results}) == 1


@pytest.mark.parametrize("changes", [{"engine__zero_stage": stage} for stage in range(4)])
def test_without_the_average_copies_drift_apart_and_are_named(two_ranks, changes):
    for differing, _ in two_ranks.run(copies_after_noise, changes, False):
        assert "image_embed.position" in str(differing), differing


def copies_of_one_rank_changed(mesh, stage):
    """One weight of one rank is another, as after a flipped bit."""
    engine = tiny_engine(mesh, tiny_config(engine__zero_stage=stage, engine__tensor_parallel=1 if stage == 0 else 2))
    (fragment,) = (f for f in engine.fragments() if f.name == "temperature.log_scale")
    if mesh.world.rank == 1:
        fragment.tensors["exp_avg"][0] += torch.finfo(torch.float32).eps
    return [str(differing) for differing in differing_copies(engine.fragments(), mesh.world)]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_flipped_bit_in_a_copy_is_told_with_both_ranks(two_ranks, stage):
    said = "exp_avg of temperature.log_scale differs between ranks 0 and 1"
    assert two_ranks.run(copies_of_one_rank_changed, stage) == [[said], [said]]
