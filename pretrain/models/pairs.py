"""Pairs of captions and images for the matching objective: the true ones, and hard negatives of both sides.

Shapes: B samples on this rank, G on all ranks that a pool lies on, R = 3 B rows [match; negative image; negative text],
P patches, D width, E embedding width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from pretrain.collectives import Group, Route, fetch, find_route
from pretrain.config import Config
from pretrain.models.heads import IDENTITY
from pretrain.models.layer import Layer
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.matching import mine_hard_negatives

NEGATIVES = ("negative_images", "negative_texts", "negatives_valid")


class Mining(nn.Module):
    """Which other samples lend each sample an image and a caption that look right and are wrong."""

    def __init__(self, pool: int, seed: int, group: Group) -> None:
        super().__init__()
        self.pool, self.seed, self.group = pool, seed, group

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        log_scale: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, E) embeddings, (1,), (B,) ids and positions -> (B,) rows of G, (B,) rows of G, (B,) int64 0 or 1."""
        identity = Identity(image_ids, caption_ids)
        found = mine_hard_negatives(
            image.detach(), text.detach(), log_scale.detach(), identity, positions, self.pool, self.seed, self.group
        )
        return found.image_rows, found.text_rows, found.valid.long()


class PairUp(nn.Module):
    """Lays out the pairs. What of a negative lies on another rank is fetched, and its gradient returned."""

    def __init__(self, group: Group) -> None:
        """`group`: the ranks that a pool lies on; None if every pool lies on one."""
        super().__init__()
        self.group = group

    def forward(
        self, negative_images: Tensor, negative_texts: Tensor, valid: Tensor, images: Tensor, *captions: Tensor
    ) -> tuple[Tensor, ...]:
        """(B,) indices and flags, (B, P, D) images, and what there is of each caption.

        Returns:
            The (B or 2B, P, D) images that pairs look at; the image of each pair, (R,); 1 where they belong together,
            (R,); 1 where a pair counts, (R,); and for each of `captions` that of each pair, (R, ...).
        """
        B = len(images)
        own = torch.arange(B, device=images.device)
        others = [caption[negative_texts] for caption in captions] if self.group is None else []
        if self.group is not None:
            by_image, by_text = (find_route(rows, B, self.group) for rows in (negative_images, negative_texts))
            images = torch.cat([images, fetch(images, by_image, self.group)])
            negative_images = B + own
            others = [_fetch_any(caption, by_text, self.group) for caption in captions]
        pairs = (torch.cat([caption, caption, other]) for caption, other in zip(captions, others, strict=True))
        ones = torch.ones_like(own)
        return (
            images,
            torch.cat([own, negative_images, own]),
            torch.cat([ones, 0 * ones, 0 * ones]),
            torch.cat([ones, valid, valid]),
            *pairs,
        )


class OwnImages(nn.Module):
    """Each row looks at its own sample's image."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.arange(len(positions), device=positions.device)


def mining(config: Config, pool: int, group: Group, *, prior: bool = False) -> Layer:
    """Finds negatives by similarity. `prior`: in a first pass, so that layers below the embeddings see them, too."""
    module = partial(Mining, pool, config.seed, _group_of_pool(config, pool, group))
    reads = ("image_embeddings", "text_embeddings", "log_scale", *IDENTITY, "positions")
    return Layer("mining", module, reads, NEGATIVES, prior=prior)


def pair_up(config: Config, pool: int, group: Group, captions: tuple[str, ...]) -> Layer:
    """From negatives, `image_tokens` and what is named of each caption, x, to `seen` images and pairs/x."""
    module = partial(PairUp, _group_of_pool(config, pool, group))
    writes = ("seen", "pairs/image", "pairs/label", "pairs/valid", *(f"pairs/{name}" for name in captions))
    return Layer("pair_up", module, (*NEGATIVES, "image_tokens", *captions), writes)


def own_images(name: str) -> Layer:
    """The image of each row of which every sample has one, under a name."""
    return Layer("own_images", OwnImages, ("positions",), (name,))


def _group_of_pool(config: Config, pool: int, group: Group) -> Group:
    """The ranks that a pool lies on: a rank holds whole grains."""
    return group if pool > config.data.grain else None


def _fetch_any(rows: Tensor, route: Route, group: Group) -> Tensor:
    """Masks travel as bytes."""
    return fetch(rows.to(torch.uint8), route, group).bool() if rows.dtype == torch.bool else fetch(rows, route, group)
