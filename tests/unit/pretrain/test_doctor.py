"""What the doctor makes of a config, of curves and of speeds; tests/e2e/test_doctor_command.py runs it."""

import io
import math

import pytest
import torch
from rich.console import Console

from distributed.tiny import CLIP, VOCABULARY, tiny_config
from pretrain.doctor import Comparison, _comparison_table, describe_speeds, made_up_steps, shrink
from pretrain.models.architectures import architecture_of
from pretrain.parallel.mesh import ALONE, Axis

BIG = {
    "model__image": {"size": 224, "patch": 16, "width": 1024, "depth": 24, "heads": 16},
    "model__text": {"length": 40, "width": 1024, "depth": 12, "heads": 16},
    "model__fusion": {"depth": 12, "heads": 16},
    "data__grain": 16,
    "objectives__matching__pool": 8,
    "training__global_batch": 2048,
    "training__accumulation": 8,
}
BIG_CLIP = {key: value for key, value in BIG.items() if not key.startswith(("model__fusion", "objectives__"))} | CLIP


def kinds(config):
    """The layers of a config by name, their numbers left out."""
    return {layer.name.rstrip("0123456789") for layer in layers(config)}


def layers(config):
    return architecture_of(config, VOCABULARY).layers


@pytest.mark.parametrize("changes", [BIG, BIG_CLIP, BIG | {"objectives__contrastive__loss": "sigmoid"}])
def test_the_copy_is_small_and_has_every_kind_of_layer(changes):
    config = tiny_config(**changes)
    copy = shrink(config, dp_size=4)
    assert kinds(copy) == kinds(config)
    assert copy.engine == config.engine
    assert copy.optimizer == config.optimizer
    assert copy.objectives.contrastive == config.objectives.contrastive
    assert copy.training.global_batch <= 64
    assert len(layers(copy)) < len(layers(config)) / 2
    assert sum(p.numel() for layer in layers(copy) for p in layer.build().parameters()) < 10e6


@pytest.mark.parametrize("stages", [2, 8, 48])
def test_the_copy_has_a_layer_for_each_stage(stages):
    config = tiny_config(**BIG, engine__pipeline_parallel=stages, engine__zero_stage=1)
    assert stages <= len(layers(shrink(config, dp_size=1))) <= len(layers(config))


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_zero_3_partitions_the_copys_large_matrices(tensor_parallel):
    copy = shrink(tiny_config(**BIG, engine__tensor_parallel=tensor_parallel), dp_size=2)
    for width in (copy.model.image.width, copy.model.text.width):
        assert 4 * width**2 / tensor_parallel > 1e5  # DeepSpeed's stage3_param_persistence_threshold


@pytest.mark.parametrize(("grain", "pool", "grains"), [(16, 8, 1), (16, 16, 1), (16, 64, 4), (2, 2, 1), (8, 256, 4)])
def test_a_pool_of_several_grains_has_as_many_in_the_copy_up_to_one_a_rank(grain, pool, grains):
    copy = shrink(tiny_config(**BIG | {"data__grain": grain, "objectives__matching__pool": pool}), dp_size=4)
    assert copy.objectives.matching is not None
    assert copy.objectives.matching.pool == copy.data.grain * grains
    assert copy.training.global_batch // copy.training.accumulation // copy.data.grain % 4 == 0


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 2),
        ({"objectives__contrastive__negatives": "global_batch", "training__accumulation": 2}, 4),
        ({"objectives__matching__pool": 64}, 1),
        ({"objectives__matching__pool": 32 * 4096}, 1),
        ({"engine__pipeline_parallel": 4, "engine__zero_stage": 1, "training__accumulation": 8}, 10),
    ],
)
def test_thousands_of_ranks_take_few_samples_each(changes, most):
    plenty = {"training__global_batch": 32 * 4096 * 8, "training__accumulation": 1}
    copy = shrink(tiny_config(**BIG | plenty | changes), dp_size=4096)
    assert copy.training.global_batch == most * 4096


def steps(step, config, dp=ALONE):
    return made_up_steps(step, config, VOCABULARY, dp, torch.device("cpu"))


def test_ranks_read_together_what_one_process_reads():
    copy = shrink(tiny_config(**BIG), dp_size=2)
    alone, _ = steps(1, copy)
    parts = [steps(1, copy, Axis(rank, 2, None))[0] for rank in (0, 1)]
    rows = {int(p): row for part in parts for p, row in zip(part["positions"], part["images"], strict=True)}
    assert sorted(rows) == alone["positions"].tolist()
    assert all(torch.equal(rows[int(p)], row) for p, row in zip(alone["positions"], alone["images"], strict=True))


def test_samples_are_no_special_case():
    copy = shrink(tiny_config(**BIG), dp_size=4)
    batches = [batch for step in range(2) for batch in steps(step, copy)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert (whole["text"] == VOCABULARY.pad).any()
    assert (whole["text"][:, :3] != VOCABULARY.pad).all()
    assert 0 < (whole["masked_targets"] == -100).sum() < whole["masked_targets"].numel()
    ids = whole["image_ids"].tolist()
    assert len(set(ids)) < len(ids)
    assert whole["positions"].tolist() == list(range(len(ids)))


def comparison(*norms, precision="fp32"):
    curves = [[{"matching": 0.7, "gradient norm": 2.0}, {"matching": 0.6, "gradient norm": norm}] for norm in norms]
    return Comparison(precision, precision, curves[0], curves)


def test_equal_curves_are_no_problem():
    assert comparison(3.0, 3.0001, 2.9999).problem(["a", "a", "b"]) is None


@pytest.mark.parametrize("norm", [3.1, math.nan, math.inf])
def test_a_rank_that_differs_is_named_with_both_figures_and_what_to_do(norm):
    problem = comparison(3.0, 3.0, norm).problem(["a", "a", "b"])
    assert problem is not None
    assert problem.startswith(f"fp32: gradient norm of step 2 is {norm:.6g} on rank 2 of b and 3 in one process")
    assert "0.0001 is allowed" in problem
    assert "engine.zero_stage=0" in problem


@pytest.mark.parametrize(("loss", "norm", "wrong"), [(0.65, 3.5, None), (0.7, 3, "matching"), (0.6, 3.7, "gradient")])
def test_in_bf16_a_norm_may_differ_more_than_a_loss(loss, norm, wrong):
    found = comparison(3.0, norm, precision="bf16")
    found.curves[1][1]["matching"] = loss
    problem = found.problem(["a", "b"])
    assert problem is None if wrong is None else problem is not None and problem.startswith(f"bf16: {wrong}")


def test_a_slow_rank_is_named_with_its_host_and_both_figures():
    text = describe_speeds([4e12, 4.1e12, 3.0e12, 3.9e12], ["a", "a", "b", "b"], torch.bfloat16)
    assert "Matrix products in bfloat16, TFLOP/s a rank: median 3.95, slowest 3, fastest 4.1." in text
    assert "Slow: rank 2 on b makes 3 TFLOP/s, 76% of the median 3.95." in text
    assert text.count("Slow") == 1


def test_ranks_that_are_about_equally_fast_are_not_called_slow():
    text = describe_speeds([40e9, 42e9, 33e9], ["a"] * 3, torch.float32)
    assert text == "Matrix products in float32, GFLOP/s a rank: median 40, slowest 33, fastest 42."


def test_no_heading_is_cut_at_80_columns():
    point = {"contrastive": 1.0, "matching": 1.0, "masked_lm": 1.0, "gradient norm": 1.0}
    curves = [[point], [dict.fromkeys(point, 1.001)]]
    names = ("rank alone", "fp32", "bf16")
    comparisons = [Comparison(name, "bf16" if name == "bf16" else "fp32", curves[0], curves) for name in names]
    with io.StringIO() as file:
        Console(width=80, file=file).print(_comparison_table(comparisons))
        shown = file.getvalue()
    for word in ("contrastive", "matching", "masked_lm", "norm", "allowed", "of norm", *names):
        assert word in shown
    assert "…" not in shown
