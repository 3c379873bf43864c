"""Image-text contrastive objective as a question a pair, together or apart, instead of a softmax over all of them.

No sum runs over a whole row, so that no rank needs all columns at once: captions travel round the ring of ranks, each
rank sees one block of pairs at a time, and the gradient of every block is worked out while it is there and travels on
with its captions. After a whole round these are home again, gradient and all; nothing is kept for a second one.
Shapes: B samples on this rank, G on all ranks, E embedding width, R rows at a time.
Source: Zhai et al., Sigmoid loss for language image pre-training (2023), sections 3.2 and 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pretrain.collectives import Group, group_size, ring_shift, row_offset
from pretrain.objectives.contrastive import MAX_LOGITS, Identity


def sigmoid_loss(
    image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, bias: Tensor, identity: Identity, group: Group
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of "does caption j belong to image i?", summed over all G captions, mean over this rank's B images.

    The gradient is that of the mean over ranks once an engine has averaged over them, as for
    `all_gather_with_gradient`, and takes for granted that all ranks weigh this loss alike.

    Args:
        image_BE, text_BE: float32, unit-length embeddings of matching pairs.
        log_scale: (1,) logarithm of the inverse temperature.
        bias: (1,) added to every logit; it starts far below zero, as nearly all pairs do not belong together.
        identity: ids of this rank's samples; pairs that are false negatives leave the sum.
        group: the ranks whose samples are negatives.

    Returns:
        The loss, a scalar, and (2,) int64 counts: rows whose own partner ranks first, rows asked; both directions.
    """
    return _SigmoidLoss.apply(image_BE, text_BE, log_scale.float(), bias.float(), identity, group)


class _SigmoidLoss(Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, bias: Tensor, identity: Identity, group: Group
    ) -> tuple[Tensor, Tensor]:
        loss, counts, gradients = _round(image_BE, text_BE, log_scale, bias, identity, group)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(counts)
        return loss, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None


def _round(
    image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, bias: Tensor, identity: Identity, group: Group
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, counts, and the loss's gradients with regard to images, captions, log_scale and bias."""
    B, E = image_BE.shape
    rank, ranks, everyone = row_offset(1, group), group_size(group), identity.gathered(group)
    loss, scale_gradient, bias_gradient = (torch.zeros_like(bias) for _ in range(3))
    image_gradient = torch.zeros_like(image_BE)
    nearest_text = image_BE.new_full((B,), float("-inf"))  # cosine of each image's most similar wrong caption
    travelling = torch.cat([text_BE, torch.zeros_like(text_BE), nearest_text[:, None]], dim=1)  # (B, 2E + 1)
    rows = max(1, MAX_LOGITS // B)
    for step in range(ranks):
        owner = (rank - step) % ranks
        texts, text_gradient, nearest_image = travelling.split([E, E, 1], dim=1)  # views
        theirs = slice(owner * B, (owner + 1) * B)
        columns = Identity(everyone.image_ids[theirs], everyone.caption_ids[theirs])
        for start in range(0, B, rows):
            part = slice(start, start + rows)
            ids = Identity(identity.image_ids[part], identity.caption_ids[part])
            sign = ids.same(columns).float() - 1  # (R, B): -1 apart, 1 together, 0 left out
            if owner == rank:
                sign.diagonal(start).fill_(1)
            cosine = image_BE[part] @ texts.T  # (R, B)
            logits = log_scale.exp() * cosine + bias
            loss += (F.softplus(-sign * logits) * sign.abs()).sum()
            slope = -sign * torch.sigmoid(-sign * logits)  # of the loss, by logit
            bias_gradient += slope.sum()
            slope *= log_scale.exp()  # by cosine
            scale_gradient += (slope * cosine).sum()
            image_gradient[part] += slope @ texts
            text_gradient += slope.T @ image_BE[part]
            wrong = cosine.masked_fill_(sign >= 0, float("-inf"))
            nearest_text[part] = nearest_text[part].maximum(wrong.amax(dim=1))
            nearest_image.copy_(nearest_image.maximum(wrong.amax(dim=0)[:, None]))
        travelling = ring_shift(travelling, group)
    own = (image_BE * text_BE).sum(dim=1)
    _, text_gradient, nearest_image = travelling.split([E, E, 1], dim=1)  # home again
    right = (own > nearest_text).sum() + (own > nearest_image[:, 0]).sum()
    gradients = [gradient / B for gradient in (image_gradient, text_gradient, scale_gradient, bias_gradient)]
    return loss[0] / B, torch.stack([right, torch.full_like(right, 2 * B)]), gradients
