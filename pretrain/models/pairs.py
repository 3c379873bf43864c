"""Pairs of captions and images for the matching objective: true ones, and hard negatives of both sides or random ones.

Shapes: B samples on this rank, G on all ranks that a pool lies on, R = 3 B rows [match; negative image; negative text],
P patches, D width, E embedding width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from pretrain.collectives import Group, Route, fetch, find_route
from pretrain.config import Config
from pretrain.models.heads import IDENTITY
from pretrain.models.layer import Layer, Rows, Spans
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.matching import draw_images, mine_hard_negatives

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
    """Lays out the pairs. Captions that lie on another rank are fetched, and their gradients returned."""

    def __init__(self, group: Group) -> None:
        """`group`: the ranks that a pool lies on; None if every pool lies on one."""
        super().__init__()
        self.group = group

    def forward(
        self, negative_images: Tensor, negative_texts: Tensor, valid: Tensor, *captions: Tensor
    ) -> tuple[Tensor, ...]:
        """(B,) indices and flags, and what there is of each caption.

        Returns:
            The image of each pair among those that are seen, (R,); 1 where they belong together, (R,); 1 where a pair
            counts, (R,); and for each of `captions` that of each pair, (R, ...).
        """
        B = len(valid)
        own = torch.arange(B, device=valid.device)
        if self.group is None:
            others = [caption[negative_texts] for caption in captions]
        else:
            negative_images = B + own
            route = find_route(negative_texts, B, self.group)
            others = [_fetch_any(caption, route, self.group) for caption in captions]
        pairs = (torch.cat([caption, caption, other]) for caption, other in zip(captions, others, strict=True))
        ones = torch.ones_like(own)
        return (
            torch.cat([own, negative_images, own]),
            torch.cat([ones, 0 * ones, 0 * ones]),
            torch.cat([ones, valid, valid]),
            *pairs,
        )


class PairAtRandom(nn.Module):
    """Shows half of the captions their own images, and the others those of other samples."""

    def __init__(self, pool: int, seed: int, group: Group) -> None:
        super().__init__()
        self.pool, self.seed, self.group = pool, seed, group

    def forward(
        self, image_ids: Tensor, caption_ids: Tensor, positions: Tensor, *captions: Tensor
    ) -> tuple[Tensor, ...]:
        """(B,) ids and positions, and what there is of each caption -> (B,) rows of G, then as PairUp, with R = B."""
        identity = Identity(image_ids, caption_ids)
        rows, label, valid = draw_images(identity, positions, self.pool, self.seed, self.group)
        index = rows if self.group is None else len(rows) + torch.arange(len(rows), device=rows.device)
        return rows, index, label, valid, *captions


class See(nn.Module):
    """The images that rows look at: this rank's and, behind them, those that other ranks lend its pairs."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, images: Tensor, lenders: Tensor | None = None, *, spans: Spans) -> Tensor:
        """(B, P, D), and (B,) rows of G if there are pairs -> (B or 2B, P, D)."""
        if self.group is None or lenders is None:
            return images
        route = find_route(lenders, len(images), self.group)
        return torch.cat([images, fetch(images, route, self.group)])


class OwnImages(nn.Module):
    """Each row looks at its own sample's image."""

    def forward(self, text: Tensor) -> Tensor:
        return torch.arange(len(text), device=text.device)


def mining(config: Config, pool: int, group: Group, *, prior: bool = False) -> Layer:
    """Finds negatives by similarity. `prior`: in a first pass, so that layers below the embeddings see them, too."""
    module = partial(Mining, pool, config.seed, _group_of_pool(config, pool, group))
    reads = ("image_embeddings", "text_embeddings", "log_scale", *IDENTITY, "positions")
    return Layer("mining", module, reads, NEGATIVES, prior=prior)


def pair_up(config: Config, pool: int, group: Group, captions: tuple[str, ...]) -> Layer:
    """From negatives and what is named of each caption, x, to pairs/x."""
    module = partial(PairUp, _group_of_pool(config, pool, group))
    return Layer("pair_up", module, (*NEGATIVES, *captions), _pairs_of(captions))


def pair_at_random(config: Config, pool: int, group: Group, captions: tuple[str, ...]) -> Layer:
    """From what is named of each caption, x, to pairs/x, with images for which no similarity is needed."""
    module = partial(PairAtRandom, pool, config.seed, _group_of_pool(config, pool, group))
    writes = ("negative_images", *_pairs_of(captions))
    return Layer("pair_at_random", module, (*IDENTITY, "positions", *captions), writes)


def see(config: Config, pool: int, group: Group, rows: Rows, pairs: str) -> Layer:
    """From `image_tokens` to the images that are `seen`: with negatives' only if there are rows of the kind `pairs`."""
    module = partial(See, group := _group_of_pool(config, pool, group))
    only = {"negative_images": (pairs,)} if group else {}
    return Layer("see", module, ("image_tokens", *only), ("seen",), rows=rows, only=only)


def own_images(name: str) -> Layer:
    """The image of each row of which every sample has one, under a name."""
    return Layer("own_images", OwnImages, ("text",), (name,))


def _pairs_of(captions: tuple[str, ...]) -> tuple[str, ...]:
    return "pairs/image", "pairs/label", "pairs/valid", *(f"pairs/{name}" for name in captions)


def _group_of_pool(config: Config, pool: int, group: Group) -> Group:
    """The ranks that a pool lies on: a rank holds whole grains."""
    return group if pool > config.data.grain else None


def _fetch_any(rows: Tensor, route: Route, group: Group) -> Tensor:
    """Masks travel as bytes."""
    return fetch(rows.to(torch.uint8), route, group).bool() if rows.dtype == torch.bool else fetch(rows, route, group)
