"""AdamW with bounds, what decays, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ContrastiveConfig, OptimizerConfig


class BoundedAdamW(torch.optim.AdamW):
    """AdamW that holds a parameter group with `bounds` between them after each step, and copies equal.

    Both act on whatever tensors a group holds. Under ZeRO those are fp32 partitions, on the ranks that own them; doing
    it to the model's own parameters would have no effect there.
    """

    average: Callable[[Tensor], Tensor] | None = None
    """In place, over the ranks that hold copies of the groups marked `copied`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.average:
            for group in self.param_groups:
                for parameter in group["params"] if group["copied"] else ():
                    self.average(parameter.grad)
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
    copied: Collection[str] | None = None,
) -> BoundedAdamW:
    """AdamW over groups: matrices, which decay; 1-D parameters, which do not; the temperature, bounded.

    Args:
        named: parameters by canonical name, partitioned or not.
        shapes: each parameter's global shape (a partitioned parameter no longer knows its own).
        copied: names of which other ranks hold copies that must stay equal; they are in groups of their own, so that
            ZeRO cuts them alike whatever else a rank holds. None where there are no such ranks.
    """
    bounds = contrastive and (-math.log(contrastive.max_temperature), -math.log(contrastive.min_temperature))
    kinds = [(config.weight_decay, None), (0.0, None), (0.0, bounds)]  # (weight decay, bounds)
    groups = [
        {"params": [], "weight_decay": decay, "bounds": limits, "copied": is_copied}
        for is_copied in ((False,) if copied is None else (False, True))
        for decay, limits in kinds
    ]
    for name, parameter in named:
        kind = 2 if name == "temperature.log_scale" else 0 if len(shapes[name]) > 1 else 1
        groups[kind + len(kinds) * (copied is not None and name in copied)]["params"].append(parameter)
    return BoundedAdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warmup, then a cosine.

    The first step already moves; the last one before the end is the closest to `final_learning_rate`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
