"""AdamW as torch has it, bounds held, a schedule that warms up and cools down."""

import math
from itertools import pairwise

import pytest
import torch

from distributed.tiny import tiny_config
from pretrain.optim import build_optimizer, learning_rate


def optimizer_of(named):
    config = tiny_config()
    shapes = {name: parameter.shape for name, parameter in named.items()}
    return build_optimizer(named.items(), shapes, config.optimizer, config.objectives.contrastive)


def test_one_dimensional_parameters_do_not_decay():
    named = {"x.weight": torch.nn.Parameter(torch.ones(2, 2)), "x.bias": torch.nn.Parameter(torch.ones(2))}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(named).step()
    assert (named["x.weight"] < 1).all()
    assert (named["x.bias"] == 1).all()


@pytest.mark.parametrize(("gradient", "bound"), [(1.0, 0.5), (-1.0, 0.01)])
def test_the_temperature_stays_within_its_bounds_and_comes_back(gradient, bound):
    scale = torch.nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
    optimizer = optimizer_of({"temperature.log_scale": scale})
    optimizer.param_groups[2]["lr"] = 0.1
    for _ in range(100):
        scale.grad = torch.tensor([gradient])
        optimizer.step()
    assert math.exp(-scale.item()) == pytest.approx(bound)
    for _ in range(50):
        scale.grad = torch.tensor([-gradient])
        optimizer.step()
    assert 0.011 < math.exp(-scale.item()) < 0.49


def test_warmup_is_linear_and_the_cosine_ends_at_the_final_rate():
    config = tiny_config(
        optimizer__learning_rate=1.0, optimizer__final_learning_rate=0.1, optimizer__warmup_steps=10
    ).optimizer
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[10:]))
