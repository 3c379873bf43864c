"""Captioning objective: name each next piece of a caption from those before it, the image in sight.

Shapes: R captions, L text length, V vocabulary.
Source: CoCa, section 3.2; BLIP, section 3.2 (language modelling, with label smoothing).
"""

import torch
from torch import Tensor

from pretrain.collectives import Group
from pretrain.objectives.cross_entropy import cross_entropy


def count_targets(ids: Tensor, pad: int) -> Tensor:
    """Target tokens of captions, (R, L) int64: all but the first token, [SEP] included."""
    return (ids[:, 1:] != pad).sum()


def captioning_loss(
    logits: Tensor,
    ids: Tensor,
    targets: Tensor,
    *,
    pad: int,
    vocabulary: int,
    group: Group = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token, such that its mean over micro-batches is the mean over all their target tokens.

    A mean per micro-batch would weigh tokens by how many others happen to stand on the same rank.

    Args:
        logits: (R, L, V), or of V this rank's share; those at place i are about the token at i + 1.
        ids: (R, L) int64.
        targets: (1,) target tokens of an average micro-batch of the step, over all ranks.
        pad: the id that is no target.
        vocabulary: V.
        group: the ranks that V is cut over.
        smoothing: see `cross_entropy`.

    Returns:
        The loss, a scalar, and (2,) int64 counts: tokens named rightly, tokens asked.
    """
    following = ids[:, 1:]
    used = following != pad
    per_token, best = cross_entropy(logits[:, :-1], following, vocabulary, group, smoothing)
    loss = torch.where(used, per_token, 0.0).sum() / targets[0]
    return loss, torch.stack([((best == following) & used).sum(), used.sum()])
