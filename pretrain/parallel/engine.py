"""The Engine: what the trainer knows of the way a model is spread over devices."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.models.layer import METRIC, Architecture, Flow
from pretrain.models.model import Report
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor import Part


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    losses: dict[str, float]
    """By objective: the mean over the global batch, unweighted."""
    counts: dict[str, tuple[int, int]]
    """By objective: right answers and questions, over the global batch."""
    metrics: dict[str, float]
    """What layers report besides: means over micro-batches and ranks."""
    gradient_norm: float
    """Before clipping, over all parameters and ranks."""
    applied: bool
    """False: the loss or the norm was not finite, or the loss above its limit, and no weight changed."""


def totals(architecture: Architecture, reports: Sequence[Report], mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Figures of a step averaged, and counts added up, over the micro-batches of all ranks; the same on every rank.

    Args:
        architecture: says how many there are.
        reports: this rank's, one per micro-batch; none on pipeline stages but the last.
        mesh: the ranks.
    """
    objectives = len(architecture.objectives)
    figures = torch.zeros(objectives + len(architecture.metrics), device=mesh.device)
    counts = torch.zeros(objectives, 2, dtype=torch.int64, device=mesh.device)
    for report in reports if mesh.tp.rank == 0 else ():  # the others of a tp axis have the same
        figures, counts = figures + report.figures / len(reports), counts + report.counts
    # One sum over all ranks: those of several axes may differ in the last digit, and ranks decide by these figures.
    return mesh.world.sum(figures) / mesh.dp.size, mesh.world.sum(counts)


def by_name(
    architecture: Architecture, figures: Tensor, counts: Tensor
) -> tuple[dict[str, float], dict[str, tuple[int, int]], dict[str, float]]:
    """Losses, counts and metrics under their names, of what `totals` says."""
    names = [objective.name for objective in architecture.objectives]
    metrics = [name.removeprefix(METRIC) for name in architecture.metrics]
    values = figures.tolist()
    return (
        dict(zip(names, values, strict=False)),
        {name: (right, asked) for name, (right, asked) in zip(names, counts.tolist(), strict=True)},
        dict(zip(metrics, values[len(names) :], strict=True)),
    )


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

    architecture: Architecture

    def step(self, micro_batches: Sequence[Flow], learning_rate: float, loss_limit: float = math.inf) -> StepResult:
        """Forward, backward and update over one global batch; no update if its loss is above `loss_limit`.

        `micro_batches` are this rank's, one per micro-step.

        Raises:
            TrainingError: a trainable parameter had no gradient, with `training.debug`.
        """
        ...

    def run(self, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
        """What layers write under the names in `want`, for each batch, without gradient.

        Besides a batch's columns, `batches` may hold what layers would write: those are not run then. All ranks call
        it together with batches of equal shapes; ranks that share a dp index get the same.
        """
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
