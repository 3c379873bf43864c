"""What is measured on the meta device agrees with the model that PyTorch builds and runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from distributed.tiny import ARCHITECTURES, VOCABULARY, micro_batches, tiny_config
from pretrain.accounting import layers as accounting
from pretrain.accounting.layers import Layout, measure_forward, measure_step
from pretrain.accounting.stages import cut_evenly, cut_into_stages
from pretrain.models.architectures import architecture_of
from pretrain.models.initial import build_layer
from pretrain.models.model import Model
from pretrain.parallel.first_pass import evaluate, prepare
from pretrain.parallel.mesh import ALONE
from pretrain.synthetic import made_up_batch

UNEQUAL = {  # no two widths, lengths or depths alike
    "model__image": {"size": 16, "patch": 4, "width": 48, "depth": 3, "heads": 2},
    "model__text__depth": 4,
}
GLOBAL_NEGATIVES = {"objectives__contrastive__negatives": "global_batch"}
MODELS = [
    UNEQUAL,
    *[each.changes for each in ARCHITECTURES.values()],
    {"objectives__contrastive__loss": "sigmoid"},
    {"objectives__matching": None},
    {"objectives__masked_lm": None},
    GLOBAL_NEGATIVES,
    GLOBAL_NEGATIVES | {"engine__activation_checkpointing": True},
]
FUSED = {  # torch has no formula for attention's kernel on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}
ONE_RANK = Layout(1, 1, 1, micro_batch=8, micro_steps=2)


def tiny(changes, **more):
    return tiny_config(**changes, **more, training__global_batch=16)


def built(config) -> Model:
    architecture = architecture_of(config, VOCABULARY)
    modules = {layer.name: build_layer(layer, 0, torch.device("cpu")) for layer in architecture.layers}
    return Model(architecture, modules, config.engine.activation_checkpointing)


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_weights_are_those_of_the_real_layers(changes):
    config = tiny(changes)
    model = built(config)
    cost = measure_step(config, VOCABULARY, ONE_RANK, gpu=False)
    real = [
        (layer.name, [p.numel() for p in model.get_submodule(layer.name).parameters()])
        for layer in model.architecture.layers
    ]
    assert [(layer.name, list(layer.weights)) for layer in cost.layers] == real
    assert measure_forward(config, VOCABULARY).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_steps_flops_are_those_that_pytorch_counts(changes):
    config = tiny(changes)
    model = built(config)
    first, counter = (FlopCounterMode(display=False, custom_mapping=FUSED) for _ in range(2))

    @torch.no_grad()
    def run_each(want, batches):
        with first:
            return [model.run(want, batch) for batch in batches]

    given = prepare(model, micro_batches(0, config), ALONE, run_each)
    with counter:
        for have, stand_ins in given:
            model(have, stand_ins).loss.backward()
    # The counter cannot look into autograd.grad: 16 images against 16 captions, both ways, of width 16, and backward.
    together = 3 * 2 * 2 * 16 * 16 * 16 if changes.items() >= GLOBAL_NEGATIVES.items() else 0
    cost = measure_step(config, VOCABULARY, ONE_RANK, gpu=False)
    assert sum(layer.flops for layer in cost.layers) == first.get_total_flops() + together + counter.get_total_flops()


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_forward_pass_costs_each_layer_what_pytorch_counts(changes):
    config = tiny(changes)
    model = built(config)
    samples = 16 if changes.items() >= GLOBAL_NEGATIVES.items() else 8  # that contrast with each other
    batch = made_up_batch(config, VOCABULARY, torch.arange(samples))
    counter = FlopCounterMode(display=False, custom_mapping=FUSED)

    @torch.no_grad()
    def run_each(want, batches):
        if set(want) == set(model.architecture.reports):
            with counter:
                model(batches[0])
        return [model.run(want, batch) for batch in batches]

    evaluate(model, model.architecture.reports, [batch], run_each)
    counted = counter.get_flop_counts()
    for name, flops in measure_forward(config, VOCABULARY).flops.items():
        if name == "contrastive_head" or list(model.get_submodule(name).parameters()):  # others look over a rank
            assert flops * samples == sum(counted.get(f"Model.{name}", {}).values()), name


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_of_a_row_of_equal_layers_those_between_the_first_and_the_last_cost_what_they_would(changes, monkeypatch):
    config = tiny(changes)
    layout = Layout(2, 2, 1, micro_batch=4, micro_steps=2)
    few = measure_step(config, VOCABULARY, layout, gpu=False)
    monkeypatch.setattr(accounting, "groupby", lambda layers, key: [(layer, [layer]) for layer in layers])
    assert measure_step(config, VOCABULARY, layout, gpu=False) == few


def test_what_only_one_objective_needs_is_left_out_with_it():
    config = tiny(UNEQUAL)
    whole, without = measure_forward(config, VOCABULARY), measure_forward(config, VOCABULARY, "matching")
    alone = measure_forward(tiny(UNEQUAL, objectives__matching=None), VOCABULARY).flops
    assert {name: flops for name, flops in without.flops.items() if name in alone} == alone
    assert without.flops["matching_head"] == 0 < whole.flops["matching_head"]
    assert without.flops["fusion_block_0"] < whole.flops["fusion_block_0"] / 2


@pytest.mark.parametrize("again", [False, True])
def test_tensor_parallel_divides_matrices_and_recomputing_leaves_a_blocks_input(again):
    config = tiny(UNEQUAL, engine__activation_checkpointing=again)
    one, two = (measure_step(config, VOCABULARY, Layout(1, tp, 1, 8, 1), gpu=False) for tp in (1, 2))
    blocks = [(a, b) for a, b in zip(one.layers, two.layers, strict=True) if a.name.startswith("image_block")]
    values = 8 * 16 * 48 * 4  # bytes of B x P x D
    for whole, half in blocks:
        assert sum(half.weights) == pytest.approx(sum(whole.weights) / 2, rel=0.02)
        assert whole.kept == pytest.approx((1 if again else 16) * values, rel=0.02)
        assert half.kept == pytest.approx((1 if again else 4 + 12 / 2) * values, rel=0.02)
        assert {(t.kind, t.axis, t.messages, t.size) for t in half.transfers} == {
            ("all-reduce", "tp", 4 + again, (4 + again) * values)
        }


def test_more_micro_steps_of_fewer_samples_cost_what_they_do_when_measured():
    config = tiny(UNEQUAL | GLOBAL_NEGATIVES)
    two, four = (measure_step(config, VOCABULARY, Layout(2, 2, 1, 8 // steps, steps), gpu=False) for steps in (2, 4))
    scaled = two.in_steps(2)
    for mine, theirs in zip(scaled.layers, four.layers, strict=True):
        if mine.name != "mining":  # the only one whose work grows with the square of a micro-batch
            assert mine.flops == pytest.approx(theirs.flops, rel=0.01)
        assert mine.kept == pytest.approx(theirs.kept, rel=0.05, abs=200)
        assert mine.crossing == pytest.approx(theirs.crossing, rel=0.05, abs=200)
        assert {t.kind: t.size for t in mine.transfers} == pytest.approx({t.kind: t.size for t in theirs.transfers})


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_are_contiguous_and_their_largest_is_as_small_as_can_be(name, num_stages):
    config = tiny(ARCHITECTURES[name].changes)
    architecture = architecture_of(config, VOCABULARY)
    flops = measure_forward(config, VOCABULARY).flops
    found = cut_into_stages(config, VOCABULARY, architecture, num_stages)
    assert [layer for stage in found for layer in stage] == list(architecture.layers)
    assert all(found)
    costs = list(flops.values())

    def largest(num_parts, start=0):
        if num_parts == 1:
            return sum(costs[start:])
        stops = range(start + 1, len(costs) - num_parts + 2)
        return min(max(sum(costs[start:stop]), largest(num_parts - 1, stop)) for stop in stops)

    best = largest(num_stages) if num_stages < 5 else max(costs)
    assert max(sum(flops[layer.name] for layer in stage) for stage in found) >= best
    if num_stages < 5:
        assert max(sum(flops[layer.name] for layer in stage) for stage in found) == pytest.approx(best, rel=1e-6)


def test_layers_that_cost_nothing_still_fill_a_stage():
    assert cut_evenly((0.0, 0.0, 0.0, 7.0), 4) == [range(i, i + 1) for i in range(4)]
    assert cut_evenly((7.0, 0.0, 0.0), 3) == [range(i, i + 1) for i in range(3)]
