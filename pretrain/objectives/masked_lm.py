"""Masked-language-model objective (MLM): name the hidden pieces of a caption, the image in sight.

Shapes: B samples on this rank, K masked slots a caption (some unused), V vocabulary.
Source: BERT, section 3.1; ALBEF, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

UNUSED = -100  # target of a slot that is not used


def masked_lm_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy averaged over each caption's masked pieces, then over captions.

    Every caption weighs the same, as in the other two objectives. (A mean over all masked pieces of the batch
    would need their number on all ranks and micro-steps, and change with the layout without it.)

    Args:
        logits: (B, K, V).
        targets: (B, K) int64, UNUSED where a slot is not used.

    Returns:
        The loss, a scalar, and (2,) int64 counts: pieces named rightly, pieces asked.
    """
    per_slot = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNUSED, reduction="none"
    ).view_as(targets)
    used = targets != UNUSED
    per_caption = per_slot.sum(dim=1) / used.sum(dim=1).clamp(min=1)
    correct = ((logits.argmax(dim=2) == targets) & used).sum()
    return per_caption.mean(), torch.stack([correct, used.sum()])
