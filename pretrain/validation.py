"""Evaluation while training: losses, accuracies and retrieval on held-out data, by the forward pass of training.

All ranks take part in every batch, so they agree before each one: a request to stop is heeded there, and what cannot be
read ends the evaluation, never the run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.stream.heldout import HeldoutData
from pretrain.figures import EMBEDDINGS
from pretrain.models.model import Report, report
from pretrain.parallel.engine import Engine, by_name, totals
from pretrain.parallel.mesh import ALONE, Mesh
from pretrain.retrieval import Gallery
from pretrain.stopping import Interrupted, Stop


@dataclass(frozen=True)
class Validation:
    """Means over whole micro-steps, of which the last wraps around; retrieval counts each pair once.

    `python -m pretrain evaluate` has the figures that depend on no layout.
    """

    losses: dict[str, float]
    counts: dict[str, tuple[int, int]]
    retrieval: dict[str, float]  # on the main process, if there is a space to retrieve in


class AbandonedError(Exception):
    """Why there are no figures; raised on all ranks. Empty if the run was told to stop."""


def validate(
    engine: Engine,
    mesh: Mesh,
    heldout: HeldoutData,
    micro_batch_per_rank: int,
    stop: Stop,
    beat: Callable[[], None] = lambda: None,
) -> Validation:
    """One pass over the held-out pairs. All ranks call it together.

    Args:
        engine: the model, whole or this rank's part.
        mesh: this process among the others.
        heldout: the pairs.
        micro_batch_per_rank: samples of a batch.
        stop: asked before each batch.
        beat: called before each batch.

    Raises:
        AbandonedError: a rank was told to stop, or could not read its batch.
    """
    architecture = engine.architecture
    embeddings = [name for layer in architecture.layers for name in layer.writes if name in EMBEDDINGS]
    reports: list[Report] = []
    rows: list[tuple[Tensor, ...]] = []
    batches = heldout.batches(micro_batch_per_rank, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size)
    beat()
    while (batch := _agree(mesh, stop, lambda: next(batches, None))) is not None:
        beat()
        columns = batch.to(mesh.device).tensors
        (found,) = engine.run([*architecture.reports, *embeddings], [columns])
        reports.append(report(architecture, found))
        kept = columns | found
        rows.append(tuple(kept[name].cpu() for name in ("positions", "image_ids", "caption_ids", *embeddings)))
    totals_over_samples = totals(architecture, reports, replace(mesh, pp=ALONE))  # every stage has every report
    losses, counts, _ = by_name(architecture, *totals_over_samples)
    gathered = mesh.dp.gather_objects([torch.cat(column) for column in zip(*rows, strict=True)])
    retrieval = _retrieval(gathered, len(heldout), mesh.device) if mesh.is_main and len(embeddings) == 2 else {}
    return Validation(losses, counts, retrieval)


def _agree(mesh: Mesh, stop: Stop, read: Callable[[], Batch | None]) -> Batch | None:
    """This rank's next batch, if every rank has one and none was told to stop."""
    batch, problem = None, ""
    try:
        with stop.interrupting():
            batch = read()
    except Interrupted:
        pass
    except UserError as error:
        problem = str(error)
    stopping, failing = mesh.world.sum(
        torch.tensor([stop.requested, bool(problem)], device=mesh.device).long()
    ).tolist()
    if failing:
        raise AbandonedError(next(text for text in mesh.world.gather_objects(problem) if text))
    if stopping:
        raise AbandonedError
    return batch


def _retrieval(columns_of_ranks: list[list[Tensor]], pairs: int, device: torch.device) -> dict[str, float]:
    columns = [torch.cat(parts).to(device) for parts in zip(*columns_of_ranks, strict=True)]
    positions, image_ids, caption_ids, images, texts = columns
    row = torch.empty(pairs, dtype=torch.int64, device=device)
    row[positions] = torch.arange(len(positions), device=device)  # one row a pair: the last batches wrap around
    gallery = Gallery.of(images[row], texts[row], image_ids[row], caption_ids[row])
    found = {"text_to_image": gallery.text_to_image(), "image_to_text": gallery.image_to_text()}
    return {f"{way}_R@{k}": recall.value for way, recalls in found.items() for k, recall in recalls.items()}
