"""The two towers: an image becomes patch tokens, a caption becomes text tokens, and each an embedding.

Shapes: B images, P patches, S tokens of an image, R text rows, L text length, D width, E embedding width.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.model_config import ImageTowerConfig, TextTowerConfig
from pretrain.models.blocks import Block, padding_mask
from pretrain.models.layer import Layer

# Mean and standard deviation of web images, on the scale 0-255. Source: CLIP's released preprocessing.
PIXEL_MEAN = (122.77, 116.75, 104.09)
PIXEL_STD = (68.50, 66.63, 70.32)


class Vocabulary(NamedTuple):
    """What a model knows of a tokenizer."""

    size: int
    pad: int = 0


class ImageEmbed(nn.Module):
    """uint8 pixels to patch tokens: normalise, cut, project, add what place each patch has."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(3 * config.patch**2, config.width)
        self.position = nn.Parameter(torch.empty(config.num_patches, config.width))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P, D)."""
        pixels = images.float()
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        patches = rearrange(
            (pixels - mean) / std, "b c (y p) (x q) -> b (y x) (c p q)", p=self.patch, q=self.patch
        )  # (B, P, 3 p q)
        return self.project(patches.to(self.project.weight.dtype)) + self.position


class TextEmbed(nn.Module):
    """Token ids to text tokens: look up, add what place each token has."""

    def __init__(self, width: int, length: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.pad = vocabulary.pad
        self.token = nn.Embedding(vocabulary.size, width)
        self.position = nn.Parameter(torch.empty(length, width))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L) int64 -> (R, L, D) tokens, and the mask of what each of them sees: all but padding."""
        return self.token(ids) + self.position[: ids.shape[1]], padding_mask(ids != self.pad)


class Norm(nn.Module):
    """Ends a pre-norm tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ImageProject(nn.Module):
    """The mean over an image's tokens, on the unit sphere of the space in which images and captions are compared."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, embed, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, E) float32, unit length."""
        return F.normalize(self.project(tokens.mean(dim=1)).float(), dim=1)


class TextProject(nn.Module):
    """The token at [CLS], normed, on the same sphere."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(R, L, D) -> (R, E) float32, unit length."""
        return F.normalize(self.project(self.norm(tokens[:, 0])).float(), dim=1)


def image_tower(config: ImageTowerConfig) -> list[Layer]:
    """From `images` to `image_tokens`."""
    block = partial(Block, config.width, config.heads, stack=config.depth)
    return [
        Layer("image_embed", partial(ImageEmbed, config), ("images",), ("image",)),
        *[Layer(f"image_block_{i}", block, ("image",), ("image",), recompute=True) for i in range(config.depth)],
        Layer("image_norm", partial(Norm, config.width), ("image",), ("image_tokens",)),
    ]


def text_tower(
    config: TextTowerConfig, vocabulary: Vocabulary, ids: str, stack: int, embed: type[TextEmbed] = TextEmbed
) -> list[Layer]:
    """From token ids to `text_tokens`, and `text_mask`, what each of them sees.

    Args:
        config: the tower's section.
        vocabulary: the tokenizer's.
        ids: what to read.
        stack: blocks that add to these tokens, those behind the tower included.
        embed: what makes tokens and mask of the ids.
    """
    first = partial(embed, config.width, config.length, vocabulary)
    block = partial(Block, config.width, config.heads, stack=stack)
    return [
        Layer("text_embed", first, (ids,), ("text_tokens", "text_mask")),
        *[
            Layer(f"text_block_{i}", block, ("text_tokens", "text_mask"), ("text_tokens",), recompute=True)
            for i in range(config.depth)
        ],
    ]
