"""Cross-entropy over a vocabulary that may be cut over ranks, whose logits are never gathered.

Source: Shoeybi et al., Megatron-LM (2019), section 3: sums of a few numbers per token instead of a gather of V.
"""

import torch
from torch import Tensor

from pretrain.collectives import Group, all_gather, all_reduce_max, reduce_from_tp, share_of


def cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: int, group: Group = None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the likeliest id of each token.

    Args:
        logits: (..., V), or of V this rank's share.
        targets: (...) int64.
        vocabulary: V.
        group: the ranks that V is cut over.
        smoothing: share of the target's probability that all V ids have alike.

    Returns:
        (...) float32 and (...) int64, the same on all ranks of the group.
    """
    logits, (start, _) = logits.float(), share_of(vocabulary, group)
    top, place = logits.max(dim=-1)
    largest = all_reduce_max(top, group)
    shifted = logits - largest[..., None]
    inside = (targets >= start) & (targets < start + logits.shape[-1])
    own = shifted.gather(-1, (targets - start).where(inside, 0)[..., None])[..., 0].where(inside, 0.0)
    sums = [shifted.exp().sum(dim=-1), own, *([shifted.sum(dim=-1)] if smoothing else [])]
    total, chosen, *every = reduce_from_tp(torch.stack(sums), group)
    expected = (1 - smoothing) * chosen + sum(smoothing / vocabulary * all_ids for all_ids in every)
    best = all_reduce_max(torch.where(top == largest, place + start, -1), group)
    return total.log() - expected, best


def likeliest(logits: Tensor, count: int, vocabulary: int, group: Group = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the likeliest tokens, best first, (R, count) each, the same on all ranks.

    Args:
        logits: (R, V), or of V this rank's share.
        count: how many; no more than a rank's share.
        vocabulary: V.
        group: the ranks that V is cut over.
    """
    top, places = logits.float().topk(count)
    found = top, places + share_of(vocabulary, group)[0]
    top, ids = (all_gather(part.T.contiguous(), group).T for part in found)  # (R, ranks x count)
    top, order = top.topk(count)
    ids = ids.gather(1, order)
    best, _ = cross_entropy(logits, ids[:, 0], vocabulary, group)
    return top - top[:, :1] - best[:, None], ids
