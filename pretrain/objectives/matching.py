"""Image-text matching objective (ITM): does this caption belong to this image?

Hard negatives are drawn inside pools of consecutive samples with probability softmax(similarity), by adding
Gumbel noise and taking the largest. The noise is keyed by the two samples' global positions, so the same pools
give the same negatives on any number of ranks.
Shapes: B samples on this rank, a multiple of the pool; D text width.
Source: ALBEF, section 3.2 and `Pretrain` code; masked before the softmax, so that a row without any valid
negative is defined (it contributes nothing) instead of a crash.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.contrastive import Identity
from pretrain.objectives.noise import gumbel


@dataclass(frozen=True)
class HardNegatives:
    """For each of B samples, which other sample lends its image, and which its caption."""

    image_rows: Tensor  # (B,) int64: row whose image stands in for sample i's
    text_rows: Tensor  # (B,) int64: row whose caption stands in for sample i's
    image_valid: Tensor  # (B,) bool: False where the pool has no sample with another image and caption
    text_valid: Tensor  # (B,) bool


@torch.no_grad()
def mine_hard_negatives(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale: Tensor,
    identity: Identity,
    positions: Tensor,
    pool: int,
    seed: int,
) -> HardNegatives:
    """Draws one hard negative image and one hard negative caption for each sample.

    Args:
        image_BE, text_BE: unit-length embeddings.
        log_scale: (1,) logarithm of the inverse temperature.
        identity: samples that share an image or a caption are never each other's negative.
        positions: (B,) global sample positions; samples with equal `position // pool` share a pool.
        pool: samples in a pool.
        seed: the run's seed.
    """
    similarity = (image_BE.float() @ text_BE.float().T) * log_scale.float().exp()  # (B image, B text)
    pools = positions // pool
    allowed = (pools[:, None] == pools[None, :]) & ~identity.same(identity)
    rows, columns = positions[:, None], positions[None, :]
    text_rows, text_valid = _draw(similarity + gumbel(seed, rows, columns, rows.new_tensor(0)), allowed)
    image_rows, image_valid = _draw(similarity.T + gumbel(seed, rows, columns, rows.new_tensor(1)), allowed)
    return HardNegatives(image_rows, text_rows, image_valid, text_valid)


def _draw(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The best allowed column of each row, and whether there is one (else the row's own index)."""
    best = scores.masked_fill(~allowed, float("-inf")).argmax(dim=1)
    valid = allowed.any(dim=1)
    return torch.where(valid, best, torch.arange(len(best), device=best.device)), valid


def matching_loss(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over match, negative image and negative text rows.

    A row without a valid negative counts as zero, and the mean is still over 3 B rows: a sample's weight does
    not depend on its neighbours.

    Args:
        logits: (3B, 2): B matching rows, B with a negative image, B with a negative caption; class 1 means
            "belongs together".
        valid: (3B,) bool.

    Returns:
        The loss, a scalar, and (2,) int64 counts: valid rows that are right, valid rows.
    """
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: len(logits) // 3] = 1
    per_row = F.cross_entropy(logits.float(), labels, reduction="none")
    loss = torch.where(valid, per_row, 0.0).mean()
    correct = ((logits.argmax(dim=1) == labels) & valid).sum()
    return loss, torch.stack([correct, valid.sum()])
