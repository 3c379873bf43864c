"""Retrieval metrics: where does the right answer rank?

Shapes: N pairs, I distinct images, Q queries, C candidates, E embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
MAX_SIMILARITIES = 1 << 24  # at a time: 64 MiB; all of 100,000 pairs would be 40 GiB
_ABOVE_COSINES = 1e4  # where candidates that were ranked again begin; margins are small numbers


class Recall(NamedTuple):
    """A share of queries, and what a random order would have."""

    value: float
    chance: float


Reranker = Callable[[Tensor, Tensor], Tensor]  # (Q,) queries, (Q, top) candidates -> (Q, top) scores


@dataclass(frozen=True)
class Gallery:
    """The pairs of a split as images with their captions. The same bytes are one image, however many pairs show it."""

    images: Tensor  # (I, E)
    texts: Tensor  # (N, E)
    first_pair: Tensor  # (I,) int64: a pair that shows the image
    image_of: Tensor  # (N,) int64: the image of each caption
    caption_of: Tensor  # (N,) int64: equal for equal captions, from 0

    @classmethod
    def of(cls, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor) -> "Gallery":
        """Args: (N, E) embeddings and (N,) ids of each pair's image and caption."""
        distinct, image_of = image_ids.unique(return_inverse=True)
        numbers = torch.arange(len(image_ids), device=image_ids.device)
        first = torch.full_like(distinct, len(numbers)).scatter_reduce(0, image_of, numbers, "amin")
        return cls(images[first], texts, first, image_of, caption_ids.unique(return_inverse=True)[1])

    def text_to_image(self, top: int = 0, rerank: Reranker | None = None) -> dict[int, Recall]:
        """Each caption looks for an image that it, or a caption equal to it, was written for."""
        relevant = partial(_related, left=self.caption_of, right=self.image_of, columns=len(self.images))
        return _search(self.texts, self.images, lambda queries: relevant(self.caption_of[queries]), top, rerank)

    def image_to_text(self, top: int = 0, rerank: Reranker | None = None) -> dict[int, Recall]:
        """Each image looks for one of its captions."""
        columns = int(self.caption_of.max()) + 1
        relevant = partial(_related, left=self.image_of, right=self.caption_of, columns=columns)
        return _search(self.images, self.texts, lambda queries: relevant(queries)[:, self.caption_of], top, rerank)

    def random_negatives(self, generator: torch.Generator, rounds: int = 100) -> tuple[Tensor, Tensor]:
        """(n,) pairs and for each another one, whose caption was not written for its image. Pairs without any go."""
        captions = int(self.caption_of.max()) + 1
        together = self.image_of * captions + self.caption_of
        pairs = torch.arange(len(together))
        partners = pairs.clone()
        wrong = pairs  # those whose partner is still their own
        for _ in range(rounds):
            partners[wrong] = torch.randint(len(pairs), wrong.shape, generator=generator)
            clash = torch.isin(self.image_of[wrong] * captions + self.caption_of[partners[wrong]], together)
            wrong = wrong[clash]
        found = torch.ones(len(pairs), dtype=torch.bool)
        found[wrong] = False
        return pairs[found], partners[found]


def recall(similarity: Tensor, relevant: Tensor) -> dict[int, float]:
    """Share of queries with a relevant candidate among the first k, for each k of RECALL_AT.

    A candidate as similar as the best relevant one, but not relevant, ranks before it: ties give nothing away.

    Args:
        similarity: (Q, C).
        relevant: (Q, C) bool; every caption or image identical to the query's own counts.
    """
    best = similarity.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)  # (Q, 1)
    ahead = ((similarity >= best) & ~relevant).sum(dim=1)  # (Q,)
    return {k: float((ahead < k).double().mean()) for k in RECALL_AT}


def chance_recall(relevant: Tensor) -> dict[int, float]:
    """What a random order of the candidates scores on average, by the hypergeometric distribution."""
    candidates = relevant.shape[1]
    num_relevant = relevant.sum(dim=1).double().cpu()
    chances = {}
    for k in RECALL_AT:
        draws = torch.arange(min(k, candidates), dtype=torch.float64)
        left = (candidates - num_relevant[:, None] - draws).clamp(min=0) / (candidates - draws)  # (Q, k)
        chances[k] = float((1 - left.prod(dim=1)).mean())
    return chances


def _search(
    queries: Tensor, candidates: Tensor, relevant_of: Callable[[Tensor], Tensor], top: int, rerank: Reranker | None
) -> dict[int, Recall]:
    """Recall over all queries, some at a time; with `rerank`, which orders each query's `top` candidates anew."""
    values, chances = dict.fromkeys(RECALL_AT, 0.0), dict.fromkeys(RECALL_AT, 0.0)
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, MAX_SIMILARITIES // len(candidates))):
        similarity, relevant = queries[rows] @ candidates.T, relevant_of(rows)  # (Q, C)
        if rerank is not None:
            best = similarity.topk(min(top, len(candidates)), dim=1).indices
            similarity.scatter_(1, best, rerank(rows, best).to(similarity) + _ABOVE_COSINES)
        share = len(rows) / len(queries)
        found, chance = recall(similarity, relevant), chance_recall(relevant)
        for k in RECALL_AT:
            values[k] += share * found[k]
            chances[k] += share * chance[k]
    return {k: Recall(values[k], chances[k]) for k in RECALL_AT}


def _related(keys: Tensor, *, left: Tensor, right: Tensor, columns: int) -> Tensor:
    """(Q, columns) bool: whether some n has left[n] equal to the row's key and right[n] to the column."""
    distinct, row_of = keys.unique(return_inverse=True)
    row = torch.searchsorted(distinct, left).clamp(max=len(distinct) - 1)  # (N,)
    among = distinct[row] == left
    related = torch.zeros(len(distinct), columns, dtype=torch.bool, device=keys.device)
    related[row[among], right[among]] = True
    return related[row_of]
