"""Keeps a step whose loss cannot be trusted from changing weights, on every engine and all ranks alike."""

import torch
from torch import Tensor

from pretrain.parallel.mesh import Axis


class LossLimit:
    """Makes the losses of an optimizer step not a number where it must be skipped.

    Engines skip a step by its gradient norm, in which a not-a-number of any rank ends up. So neither a loss that is not
    finite, whose gradients may be, nor a mean loss above the limit needs another way to all ranks.
    """

    def __init__(self, limit: float, count: int, dp: Axis) -> None:
        """`count` micro-batches make the step; the limit is for their mean over all ranks of `dp`."""
        self.limit, self.count, self.dp = limit, count, dp
        self._seen: list[Tensor] = []

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss to take the gradient of, for each micro-batch in turn; nothing waits for the device."""
        sound = loss.detach().isfinite()
        self._seen.append(loss.detach())
        if len(self._seen) == self.count and self.limit < float("inf"):
            sound = sound & (self.dp.mean(torch.stack(self._seen).mean()) <= self.limit)
        return loss * torch.where(sound, 1.0, torch.nan)
