"""Image-text matching objective (ITM): does this caption belong to this image?

Hard negatives are drawn inside pools of consecutive samples with probability softmax(similarity), by adding
Gumbel noise and taking the largest. The noise is keyed by the two samples' global positions, so the same pools
give the same negatives on any number of ranks, whether a rank holds whole pools or parts of them.
Shapes: B samples on this rank, G on all ranks that pools lie on, E embedding width, R rows at a time.
Source: ALBEF, section 3.2 and `Pretrain` code; masked before the softmax, so that a row without any valid
negative is defined (it contributes nothing) instead of a crash.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import Group, all_gather, row_offset
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.noise import gumbel, hashed

MAX_PAIRS = 1 << 22  # at a time: noise and scores take up to 92 bytes per pair, 25 GB for 4,096 rows against 65,536


@dataclass(frozen=True)
class HardNegatives:
    """For each of B samples, which other of G samples lends its image, and which its caption."""

    image_rows: Tensor  # (B,) int64: which of the G rows has the image that stands in for sample i's
    text_rows: Tensor  # (B,) int64: which has the caption
    valid: Tensor  # (B,) bool: False where the pool has no sample with another image and caption


@torch.no_grad()
def mine_hard_negatives(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale: Tensor,
    identity: Identity,
    positions: Tensor,
    pool: int,
    seed: int,
    group: Group = None,
) -> HardNegatives:
    """Draws one hard negative image and one hard negative caption for each sample.

    Args:
        image_BE, text_BE: unit-length embeddings.
        log_scale: (1,) logarithm of the inverse temperature.
        identity: samples that share an image or a caption are never each other's negative.
        positions: (B,) global sample positions.
        pool: samples in a pool; the first pool begins at the lowest position.
        seed: the run's seed.
        group: the ranks that a pool's samples lie on; None if every pool lies on one.
    """
    others, everyone = all_gather(positions, group), identity.gathered(group)  # (G,)
    # Not counted from 0: a run that goes on with another batch may begin its micro-steps anywhere.
    first = others.min()
    own_pool, pools = (positions - first) // pool, (others - first) // pool
    B, G = len(positions), len(others)
    own_rows = row_offset(B, group) + torch.arange(B, device=positions.device)
    sides = [(image_BE, all_gather(text_BE, group)), (text_BE, all_gather(image_BE, group))]  # (B, E), (G, E)

    drawn: list[list[Tensor]] = []
    rows = max(1, MAX_PAIRS // G)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        ids = Identity(identity.image_ids[part], identity.caption_ids[part])
        allowed = (own_pool[part, None] == pools[None, :]) & ~ids.same(everyone)  # (R, G)
        valid = allowed.any(dim=1)
        found = [valid]
        for kind, (rows_BE, columns_GE) in enumerate(sides):
            similarity = rows_BE[part].float() @ columns_GE.float().T * log_scale.float().exp()  # (R, G)
            noise = gumbel(seed, positions[part, None], others[None, :], positions.new_tensor(kind))
            best = (similarity + noise).masked_fill(~allowed, float("-inf")).argmax(dim=1)
            found.append(torch.where(valid, best, own_rows[part]))
        drawn.append(found)
    valid, text_rows, image_rows = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return HardNegatives(image_rows, text_rows, valid)


@torch.no_grad()
def draw_images(
    identity: Identity, positions: Tensor, pool: int, seed: int, group: Group = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Half of each pool, rounded down, keep their own images; the others are shown another sample's, any at random.

    Args: as for `mine_hard_negatives`.

    Returns:
        Which of the G rows has the image that is shown, 1 where it is the sample's own, and 0 where there is no other
        image to show; all (B,) int64.
    """
    alike = torch.zeros(len(positions), 1, device=positions.device)  # all images look equally right
    found = mine_hard_negatives(alike, alike, alike[0], identity, positions, pool, seed, group)
    B, others = len(positions), all_gather(positions, group)  # (G,)
    pools = (others - others.min()) // pool
    by_noise = hashed(seed, others, others.new_tensor(2)).argsort()
    order = by_noise[pools[by_noise].argsort(stable=True)]  # pool by pool, at random inside
    kept = torch.empty_like(order)
    kept[order] = (torch.arange(len(order), device=order.device) % pool < pool // 2).long()
    own = row_offset(B, group) + torch.arange(B, device=order.device)
    kept = kept[own]
    return torch.where(kept == 1, own, found.image_rows), kept, kept | found.valid.long()


def matching_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of "do this caption and this image belong together?".

    A pair that does not count is zero, and the mean is still over all R: a sample's weight does not depend on its
    neighbours.

    Args:
        logits: (R, 2); class 1 means "belongs together".
        labels: (R,) int64, 1 for pairs that do.
        valid: (R,) int64, 0 for pairs that do not count.

    Returns:
        The loss, a scalar, and (2,) int64 counts: valid pairs that are right, valid pairs.
    """
    per_pair = F.cross_entropy(logits.float(), labels, reduction="none")
    loss = torch.where(valid.bool(), per_pair, 0.0).mean()
    correct = ((logits.argmax(dim=1) == labels) & valid.bool()).sum()
    return loss, torch.stack([correct, valid.sum()])
