"""The Engine: what the trainer knows of the way a model is spread over devices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.models.model import Output
from pretrain.parallel.tensor import Part


class Inputs(Protocol):
    """A micro-batch, as far as an engine looks at it."""

    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    losses: Tensor  # (3,) float32 on the CPU: means over the global batch, in the order of OBJECTIVES
    counts: Tensor  # (3, 2) int64 on the CPU: right answers and questions, over the global batch
    gradient_norm: float  # before clipping, over all parameters and ranks
    applied: bool  # False: the loss or the norm was not finite, and no weight changed


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter and of its optimizer state, as live flat views.

    The rank holds `part` of the parameter, and the piece is elements [start, start + length) of that part laid flat
    in row-major order.
    """

    name: str
    part: Part
    start: int
    tensors: dict[str, Tensor]  # "master", "exp_avg", "exp_avg_sq": (length,) float32
    saved_here: bool = True  # False on ranks that hold a copy of what another rank saves

    @property
    def stop(self) -> int:
        return self.start + self.tensors["master"].numel()


class Engine(Protocol):
    """Takes optimizer steps on a model that may be spread over many devices."""

    device: torch.device

    def step(self, micro_batches: Sequence[Inputs], learning_rate: float) -> StepResult:
        """Forward, backward and update over one global batch; `micro_batches` are this rank's, one a micro-step."""
        ...

    def evaluate(self, batch: Inputs) -> Output:
        """A forward pass without gradient. All ranks call it together."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's state. Writing into the views and calling `loaded` restores it."""
        ...

    def loaded(self, steps: int) -> None:
        """Makes weights follow the master copies in the fragments, after `steps` applied optimizer steps."""
        ...

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied so far, those before a resume included: what AdamW's bias correction counts."""
        ...
