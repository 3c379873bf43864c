"""AdamW with bounds, what decays, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ContrastiveConfig, OptimizerConfig


class BoundedAdamW(torch.optim.AdamW):
    """AdamW that holds a parameter group with `bounds` between them after each step.

    The clamp acts on whatever tensors the group holds. Under ZeRO those are fp32 partitions, on the ranks that own
    them; clamping the model's own parameter would have no effect there.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        for group in self.param_groups:
            if group["bounds"] is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group["bounds"])

    def prime(self, parameter: Tensor) -> None:
        """Gives a parameter the state of zero steps, so that a checkpoint can be loaded into it."""
        self.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    shapes: Mapping[str, Sequence[int]],
    config: OptimizerConfig,
    contrastive: ContrastiveConfig | None,
) -> BoundedAdamW:
    """AdamW over three groups: matrices, which decay; 1-D parameters, which do not; the temperature, bounded.

    Args:
        named: parameters by canonical name, partitioned or not.
        shapes: each parameter's global shape (a partitioned parameter no longer knows its own).
    """
    decayed, plain, temperature = [], [], []
    for name, parameter in named:
        if name == "temperature.log_scale":
            temperature.append(parameter)
        else:
            (decayed if len(shapes[name]) > 1 else plain).append(parameter)
    bounds = contrastive and (-math.log(contrastive.max_temperature), -math.log(contrastive.min_temperature))
    return BoundedAdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay, "bounds": None},
            {"params": plain, "weight_decay": 0.0, "bounds": None},
            {"params": temperature, "weight_decay": 0.0, "bounds": bounds},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warmup, then a cosine.

    The first step already moves; the last one before the end is the closest to `final_learning_rate`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
