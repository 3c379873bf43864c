"""The arithmetic on the config agrees with the model that PyTorch builds and runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.masking import num_masked_slots
from distributed.tiny import PAD, VOCABULARY, samples, tiny_config
from pretrain.accounting import memory
from pretrain.accounting.layers import Weight, layers, masked_slots
from pretrain.accounting.stages import cut_evenly, stages, step_flops
from pretrain.models.architectures import layer_specs
from pretrain.models.model import build_model
from pretrain.objectives import contrastive
from pretrain.parallel.tensor import PLAN

DUAL = {
    "model__architecture": "dual_encoder",
    "model__fusion": None,
    "objectives__matching": None,
    "objectives__masked_lm": None,
}
UNEQUAL = {  # no two widths, lengths or depths alike
    "model__image": {"size": 16, "patch": 4, "width": 48, "depth": 3, "heads": 2},
    "model__text__depth": 1,
    "model__embed": 20,
    "model__fusion__depth": 2,
}
SIGMOID = {"objectives__contrastive": {"loss": "sigmoid"}}
MODELS = [UNEQUAL, UNEQUAL | DUAL, SIGMOID, {"objectives__matching": None}, {"objectives__masked_lm": None}]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_layers_and_weights_are_those_of_the_real_list(changes):
    config = tiny_config(**changes)
    with torch.device("meta"):
        built = {spec.name: spec.build() for spec in layer_specs(config, VOCABULARY)}
    real = [
        (name, {f"{name}.{n}": tuple(p.shape) for n, p in layer.named_parameters()}) for name, layer in built.items()
    ]
    assert [(cost.name, {w.name: w.shape for w in cost.weights}) for cost in layers(config, VOCABULARY)] == real
    for cost, layer in zip(layers(config, VOCABULARY), built.values(), strict=True):
        assert cost.parameters == sum(p.numel() for p in layer.parameters())


def test_weights_are_cut_as_the_plan_of_tensor_parallelism_says():
    dims = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}, "vocabulary": {"weight": 0}}
    for cost in layers(tiny_config(), VOCABULARY):
        for weight in cost.weights:
            path, _, leaf = weight.name.rpartition(".")
            kind = next((kind for end, kind in PLAN.items() if path.endswith(end)), None)
            assert weight.cut == dims.get(kind or "", {}).get(leaf), weight.name
    assert Weight("", (61, 10), cut=0).elements(2) == 31 * 10  # the first rank's share of 61


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_each_layers_flops_are_those_that_pytorch_counts(changes):
    B = 8
    config = tiny_config(training__global_batch=B, training__accumulation=1, **changes)
    model = build_model(layer_specs(config, VOCABULARY), config, PAD, torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    batch = samples(torch.arange(B)).tensors()
    with torch.no_grad(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**batch)
    counted = counter.get_flop_counts()
    for cost in layers(config, VOCABULARY):
        besides = 0
        if cost.name == "align":
            besides += 2 * 2 * B * config.model.embed if config.objectives.matching else 0  # mining
            if config.objectives.contrastive.loss == "sigmoid":  # its backward pass is part of its forward pass
                besides += 2 * 2 * B * config.model.embed
        measured = sum(counted.get(f"VisionLanguageModel.{cost.name}", {}).values()) / B
        assert cost.forward_flops + besides == measured, cost.name


def test_masked_slots_are_those_that_the_data_fills():
    for length, probability in itertools.product((3, 12, 24, 77), (0.15, 0.3)):
        config = tiny_config(model__text__length=length, objectives__masked_lm={"probability": probability})
        assert masked_slots(config) == num_masked_slots(length, probability)


def test_global_negatives_contrast_the_whole_batch():
    def flops(**changes):
        return next(cost for cost in layers(tiny_config(**changes), VOCABULARY) if cost.name == "align").forward_flops

    more = flops(objectives__contrastive={"negatives": "global_batch"}) - flops()
    assert more == 2 * 2 * 16 * (32 - 16)  # both directions, E = 16, a batch of 32 in two micro-steps


@pytest.mark.parametrize("changes", [UNEQUAL, UNEQUAL | {"objectives__masked_lm": None}], ids=str)
def test_the_first_pass_over_a_global_batch_costs_what_pytorch_counts_without_masked_captions(changes):
    B = 8
    settings = {"training__global_batch": B, "training__accumulation": 1} | changes
    config = tiny_config(**settings, objectives__contrastive={"negatives": "global_batch"})
    model = build_model(layer_specs(config, VOCABULARY), config, PAD, torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.embed(**samples(torch.arange(B)).tensors())
    costs = layers(config, VOCABULARY)
    projections = 2 * config.model.embed * (config.model.image.width + config.model.text.width)
    more = step_flops(config, costs) - 3 * sum(cost.forward_flops for cost in costs)
    assert more + projections == counter.get_total_flops() / B


def test_as_many_logits_exist_at_a_time_as_the_loss_makes():
    assert memory.MAX_LOGITS == contrastive.MAX_LOGITS


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 11])
def test_stages_are_contiguous_and_their_largest_is_as_small_as_can_be(num_stages):
    costs = [cost.forward_flops for cost in layers(tiny_config(**UNEQUAL), VOCABULARY)]
    found = stages(tiny_config(**UNEQUAL), VOCABULARY, num_stages)
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert all(found)

    def largest(borders):
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *borders, len(costs))))

    best = min(map(largest, itertools.combinations(range(1, len(costs)), num_stages - 1)))
    assert max(sum(costs[i] for i in part) for part in found) == best


def test_layers_that_cost_nothing_still_fill_a_stage():
    assert cut_evenly((0.0, 0.0, 0.0, 7.0), 4) == [range(i, i + 1) for i in range(4)]
    assert cut_evenly((7.0, 0.0, 0.0), 3) == [range(i, i + 1) for i in range(3)]
