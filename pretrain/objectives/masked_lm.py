"""Masked-language-model objective (MLM): name the hidden pieces of a caption, the image in sight.

Shapes: B samples on this rank, K masked slots per caption (some unused), V vocabulary.
Source: BERT, section 3.1; ALBEF, section 3.2.
"""

import torch
from torch import Tensor

from data_pipelines.batch import IGNORE
from pretrain.collectives import Group
from pretrain.objectives.cross_entropy import cross_entropy


def masked_lm_loss(logits: Tensor, targets: Tensor, vocabulary: int, group: Group = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy averaged over each caption's masked pieces, then over captions.

    Every caption weighs the same, as in the other two objectives. (A mean over all masked pieces of the batch
    would need their number on all ranks and micro-steps, and change with the layout without it.)

    Args:
        logits: (B, K, V), or of V this rank's share.
        targets: (B, K) int64, IGNORE where a slot is not used.
        vocabulary: V.
        group: the ranks that V is cut over.

    Returns:
        The loss, a scalar, and (2,) int64 counts: pieces named rightly, pieces asked.
    """
    used = targets != IGNORE
    per_slot, best = cross_entropy(logits, targets.clamp(min=0), vocabulary, group)
    per_slot = torch.where(used, per_slot, 0.0)
    per_caption = per_slot.sum(dim=1) / used.sum(dim=1).clamp(min=1)
    correct = ((best == targets) & used).sum()
    return per_caption.mean(), torch.stack([correct, used.sum()])
