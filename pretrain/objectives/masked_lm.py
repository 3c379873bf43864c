"""Masked-language-model objective (MLM): name the hidden pieces of a caption, the image in sight.

Shapes: B samples on this rank, K masked slots a caption (some unused), V vocabulary.
Source: BERT, section 3.1; ALBEF, section 3.2.
"""

import torch
from torch import Tensor

from pretrain.collectives import Group, all_reduce_max, reduce_from_tp

UNUSED = -100  # target of a slot that is not used


def masked_lm_loss(logits: Tensor, targets: Tensor, group: Group = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """Cross-entropy averaged over each caption's masked pieces, then over captions.

    Every caption weighs the same, as in the other two objectives. (A mean over all masked pieces of the batch
    would need their number on all ranks and micro-steps, and change with the layout without it.)

    Args:
        logits: (B, K, V), or of V this rank's share.
        targets: (B, K) int64, UNUSED where a slot is not used.
        group: the ranks that V is cut over; their logits are never gathered.
        start: the first id of this rank's share.

    Returns:
        The loss, a scalar, and (2,) int64 counts: pieces named rightly, pieces asked.
    """
    used = targets != UNUSED
    per_slot, best = _cross_entropy(logits.float(), targets.clamp(min=0), group, start)
    per_slot = torch.where(used, per_slot, 0.0)
    per_caption = per_slot.sum(dim=1) / used.sum(dim=1).clamp(min=1)
    correct = ((best == targets) & used).sum()
    return per_caption.mean(), torch.stack([correct, used.sum()])


def _cross_entropy(logits: Tensor, targets: Tensor, group: Group, start: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the likeliest id of each slot, both (B, K), from logits (B, K, share of V).

    Source: Shoeybi et al., Megatron-LM (2019), section 3: three sums of (B, K) numbers instead of a gather of V.
    """
    top, place = logits.max(dim=2)
    largest = all_reduce_max(top, group)
    total = reduce_from_tp((logits - largest[..., None]).exp().sum(dim=2), group)
    inside = (targets >= start) & (targets < start + logits.shape[-1])
    own = logits.gather(2, (targets - start).where(inside, 0)[..., None])[..., 0] - largest
    chosen = reduce_from_tp(own.where(inside, 0.0), group)
    best = all_reduce_max(torch.where(top == largest, place + start, -1), group)
    return total.log() - chosen, best
