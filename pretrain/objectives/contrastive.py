"""Image-text contrastive objective (ITC): InfoNCE over every sample of the micro-step.

Shapes: B samples on this rank, G on all ranks, E embedding width, R rows at a time.
Source: CLIP, section 2.3 and figure 3; false negatives by id as in ALBEF's retrieval fine-tuning, here from the
first step of pretraining.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.collectives import Group, all_gather, all_gather_with_gradient, row_offset

MAX_LOGITS = 1 << 26  # at a time: 256 MiB. 4,096 rows per rank against 65,536 columns are four times as many.


@dataclass(frozen=True)
class Identity:
    """What makes two samples the same: pairs that share an image or a caption are no negatives."""

    image_ids: Tensor  # (B,) int64
    caption_ids: Tensor  # (B,) int64

    def gathered(self, group: Group) -> "Identity":
        return Identity(all_gather(self.image_ids, group), all_gather(self.caption_ids, group))

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
    image_GE = all_gather_with_gradient(image_BE, group)
    text_GE = all_gather_with_gradient(text_BE, group)
    B, G = image_BE.shape[0], image_GE.shape[0]
    own = row_offset(B, group) + torch.arange(B, device=image_BE.device)  # (B,) column of each row's partner
    everyone = identity.gathered(group)

    loss = image_BE.new_zeros((), dtype=torch.float32)
    correct = own.new_zeros(())
    rows = max(1, MAX_LOGITS // G)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        ids = Identity(identity.image_ids[part], identity.caption_ids[part])
        for rows_BE, columns_GE in ((image_BE, text_GE), (text_BE, image_GE)):
            compute = partial(_rows_loss, rows_BE[part], columns_GE, log_scale, ids, everyone, own[part])
            if rows < B:  # only some rows' logits are there at a time, forwards and backwards
                compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
            summed, right = compute()
            loss, correct = loss + summed / (2 * B), correct + right
    return loss, torch.stack([correct, torch.full_like(correct, 2 * B)])


def _rows_loss(
    rows_RE: Tensor, columns_GE: Tensor, log_scale: Tensor, identity: Identity, everyone: Identity, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of R rows against all columns, summed, and how many rank their own partner first."""
    false_negative = identity.same(everyone)  # (R, G)
    false_negative[torch.arange(len(own), device=own.device), own] = False
    logits_RG = log_scale.float().exp() * (rows_RE @ columns_GE.T).float()
    logits_RG = logits_RG.masked_fill(false_negative, float("-inf"))
    return F.cross_entropy(logits_RG, own, reduction="sum"), (logits_RG.argmax(dim=1) == own).sum()
