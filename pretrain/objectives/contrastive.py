"""Image-text contrastive objective (ITC): InfoNCE over every sample of the micro-step.

Shapes: B samples on this rank, G on all ranks, E embedding width.
Source: CLIP, section 2.3 and figure 3; false negatives by id as in ALBEF's retrieval fine-tuning, here from the
first step of pretraining.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import Group, gather, gather_with_gradient, row_offset


@dataclass(frozen=True)
class Identity:
    """What makes two samples the same: pairs that share an image or a caption are no negatives."""

    image_ids: Tensor  # (B,) int64
    caption_ids: Tensor  # (B,) int64

    def gathered(self, group: Group) -> "Identity":
        return Identity(gather(self.image_ids, group), gather(self.caption_ids, group))

    def same(self, other: "Identity") -> Tensor:
        """(B, other's B) bool: sample i of this and sample j of the other show or say the same."""
        same_image = self.image_ids[:, None] == other.image_ids[None, :]
        same_caption = self.caption_ids[:, None] == other.caption_ids[None, :]
        return same_image | same_caption


def contrastive_loss(
    image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, identity: Identity, group: Group
) -> tuple[Tensor, Tensor]:
    """Mean of both directions' cross-entropy over this rank's B rows against all G columns.

    Args:
        image_BE, text_BE: unit-length embeddings of matching pairs.
        log_scale: (1,) logarithm of the inverse temperature.
        identity: ids of this rank's samples; G columns that are false negatives leave the softmax.
        group: the ranks whose samples are negatives.

    Returns:
        The loss, a scalar, and (2,) int64 counts: rows whose own partner ranks first, rows asked.
    """
    image_GE = gather_with_gradient(image_BE, group)
    text_GE = gather_with_gradient(text_BE, group)
    B = image_BE.shape[0]
    own = row_offset(B, group) + torch.arange(B, device=image_BE.device)  # (B,) column of each row's partner
    false_negative = identity.same(identity.gathered(group))  # (B, G)
    false_negative[torch.arange(B, device=own.device), own] = False

    loss = image_BE.new_zeros((), dtype=torch.float32)
    correct = own.new_zeros(())
    for rows_BE, columns_GE in ((image_BE, text_GE), (text_BE, image_GE)):
        logits_BG = log_scale.float().exp() * (rows_BE @ columns_GE.T).float()
        logits_BG = logits_BG.masked_fill(false_negative, float("-inf"))
        loss = loss + F.cross_entropy(logits_BG, own) / 2
        correct = correct + (logits_BG.argmax(dim=1) == own).sum()
    return loss, torch.stack([correct, torch.full_like(correct, 2 * B)])
