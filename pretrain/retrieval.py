"""Retrieval metrics: where does the right answer rank?

Shapes: Q queries, C candidates.
"""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def recall(similarity: Tensor, relevant: Tensor) -> dict[int, float]:
    """Share of queries with a relevant candidate among the first k, for each k of RECALL_AT.

    A candidate as similar as the best relevant one, but not relevant, ranks before it: ties give nothing away.

    Args:
        similarity: (Q, C).
        relevant: (Q, C) bool; every caption or image identical to the query's own counts.
    """
    best = similarity.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)  # (Q, 1)
    ahead = ((similarity >= best) & ~relevant).sum(dim=1)  # (Q,)
    return {k: float((ahead < k).float().mean()) for k in RECALL_AT}


def chance_recall(relevant: Tensor) -> dict[int, float]:
    """What a random order of the candidates scores on average, by the hypergeometric distribution."""
    candidates = relevant.shape[1]
    num_relevant = relevant.sum(dim=1).double()
    chances = {}
    for k in RECALL_AT:
        draws = torch.arange(min(k, candidates), dtype=torch.float64)
        left = (candidates - num_relevant[:, None] - draws).clamp(min=0) / (candidates - draws)  # (Q, k)
        chances[k] = float((1 - left.prod(dim=1)).mean())
    return chances
