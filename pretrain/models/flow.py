"""What travels from layer to layer.

Shapes: B samples of the micro-batch on this rank, P patches, L text length, R text rows (captions and their
variants), D width, K masked slots, E embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OBJECTIVES: tuple[str, ...] = ("contrastive", "matching", "masked_lm")  # order of the entries of `losses` and `counts`


class Flow(NamedTuple):
    """A fixed tuple of tensors. Masks and ids are int64, so that a pipeline sends them without a gradient."""

    image: Tensor  # (B, 3, H, W) uint8 pixels, then (B, P, D) tokens; after alignment (2B, P, D) if negatives' images
    # come from other ranks
    text: Tensor  # (R, L) int64 ids, then (R, L, D) tokens; R is 2B ([clean; masked]), after alignment up to 4B
    text_mask: Tensor  # (R, L) int64: 1 where there is a token, 0 where padding
    image_rows: Tensor  # (R,) int64: the image each text row looks at
    negatives_valid: Tensor  # (3B,) int64: 1 for matching rows that count
    masked_positions: Tensor  # (B, K) int64
    masked_targets: Tensor  # (B, K) int64
    positions: Tensor  # (B,) int64 global sample positions
    image_ids: Tensor  # (B,) int64
    caption_ids: Tensor  # (B,) int64
    losses: Tensor  # (3,) float32, unweighted, in the order of OBJECTIVES
    counts: Tensor  # (3, 2) int64: right answers and questions, in the order of OBJECTIVES
    image_pull: Tensor  # (B, E) float32: gradient of the global batch's contrastive loss with regard to each embedding,
    text_pull: Tensor  # where a first pass has found it out; else (0,)
    pulled: Tensor  # (4,) or (5,) float32: that loss, rows right, rows asked, gradient with regard to log_scale, and
    # that of the sigmoid loss to its bias; else (0,)
    image_embeddings: Tensor  # (B, E) float32, unit length, detached; filled in by the align layer
    text_embeddings: Tensor  # (B, E)
    log_scale: Tensor  # (1,) logarithm of the inverse temperature, detached; filled in by the align layer

    def reporting(self, objective: str, loss: Tensor, counts: Tensor) -> "Flow":
        """This flow with one objective's loss and counts added."""
        chosen = torch.tensor([name == objective for name in OBJECTIVES], device=loss.device)
        return self._replace(
            losses=torch.where(chosen, self.losses + loss.float(), self.losses),  # a product would spread an infinity
            counts=self.counts + chosen[:, None] * counts[None, :],
        )


def start_flow(
    images: Tensor,
    text: Tensor,
    masked_text: Tensor | None,
    masked_positions: Tensor,
    masked_targets: Tensor,
    positions: Tensor,
    image_ids: Tensor,
    caption_ids: Tensor,
    pad_id: int,
    image_pull: Tensor | None = None,
    text_pull: Tensor | None = None,
    pulled: Tensor | None = None,
) -> Flow:
    """The flow before the first layer. Without `masked_text` the text rows are the clean captions alone."""
    rows = text if masked_text is None else torch.cat([text, masked_text])
    B = len(images)
    nothing = torch.zeros(0, device=images.device)
    return Flow(
        image=images,
        text=rows,
        text_mask=(rows != pad_id).long(),
        image_rows=torch.arange(B, device=images.device).repeat(len(rows) // B),
        negatives_valid=positions.new_ones(3 * B),
        masked_positions=masked_positions,
        masked_targets=masked_targets,
        positions=positions,
        image_ids=image_ids,
        caption_ids=caption_ids,
        losses=torch.zeros(len(OBJECTIVES), device=images.device),
        counts=positions.new_zeros(len(OBJECTIVES), 2),
        image_pull=nothing if image_pull is None else image_pull,
        text_pull=nothing if text_pull is None else text_pull,
        pulled=nothing if pulled is None else pulled,
        image_embeddings=nothing,
        text_embeddings=nothing,
        log_scale=nothing,
    )
