"""In bf16, weights and activations are half as wide; master weights, moments and what is saved stay fp32."""

import pytest
import torch

from distributed.tiny import commit, engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run

STEPS = 6


def weight_types(mesh, config):
    engine = tiny_engine(mesh, config)
    curve = engine_curve(mesh, config, STEPS, engine)
    kinds = {tensor.dtype for fragment in engine.fragments() for tensor in fragment.tensors.values()}
    return curve, {p.dtype for p in engine.model.parameters()}, kinds


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32(two_ranks, stage):
    reference = plain_curve(tiny_config(), STEPS)
    config = tiny_config(engine__zero_stage=stage, engine__precision="bf16")
    for curve, weights, masters in two_ranks.run(weight_types, config):
        assert weights == {torch.bfloat16}
        assert masters == {torch.float32}
        for here, expected in zip(curve, reference, strict=True):
            assert here.losses == pytest.approx(expected.losses, rel=0.05)


def resumed_curve(mesh, config, folder):
    """Steps 3 to 5 of a run that goes on, and of one that loads what the first saved after step 2."""
    store = CheckpointStore(folder, mesh.world)
    first = tiny_engine(mesh, config)
    engine_curve(mesh, config, 3, first)
    commit(store, 3, first)
    second = tiny_engine(mesh, config)
    checkpoint = store.newest_valid()
    store.load(checkpoint, second.fragments())
    second.loaded(read_run(checkpoint)["applied_steps"])
    return [engine_curve(mesh, config, 3, engine, first=3) for engine in (first, second)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_bf16_run_is_the_same_to_the_last_digit(two_ranks, tmp_path, stage):
    config = tiny_config(engine__zero_stage=stage, engine__precision="bf16")
    for went_on, resumed in two_ranks.run(resumed_curve, config, tmp_path):
        assert went_on == resumed
