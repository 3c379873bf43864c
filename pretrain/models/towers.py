"""The two towers: an image becomes patch tokens, a caption becomes text tokens.

Shapes: B images, P patches, R text rows, L text length, D width, V vocabulary.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.config import ImageTowerConfig, TextTowerConfig
from pretrain.models.flow import Flow
from pretrain.models.layers import Block

# Mean and standard deviation of web images, on the scale 0-255. Source: CLIP's released preprocessing.
PIXEL_MEAN = (122.77, 116.75, 104.09)
PIXEL_STD = (68.50, 66.63, 70.32)


class ImageEmbed(nn.Module):
    """uint8 pixels to patch tokens: normalise, cut, project, add what place each patch has."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(3 * config.patch**2, config.width)
        self.position = nn.Parameter(torch.empty(config.num_patches, config.width))

    def forward(self, flow: Flow) -> Flow:
        pixels = flow.image.float()
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        patches = rearrange(
            (pixels - mean) / std, "b c (y p) (x q) -> b (y x) (c p q)", p=self.patch, q=self.patch
        )  # (B, P, 3 p q)
        return flow._replace(image=self.project(patches.to(self.project.weight.dtype)) + self.position)


class ImageBlock(Block):
    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__(config.width, config.heads)

    def forward(self, flow: Flow) -> Flow:
        return flow._replace(image=self.transform(flow.image))


class ImageNorm(nn.Module):
    """Ends the pre-norm image tower; its output is what is pooled and what fusion layers look at."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)

    def forward(self, flow: Flow) -> Flow:
        return flow._replace(image=self.norm(flow.image))


class TextEmbed(nn.Module):
    """Token ids to text tokens: look up, add what place each token has."""

    def __init__(self, config: TextTowerConfig, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.length, config.width))

    def embed(self, ids: Tensor) -> Tensor:
        """(R, L) int64 -> (R, L, D)."""
        return self.token(ids) + self.position[: ids.shape[1]]

    def forward(self, flow: Flow) -> Flow:
        return flow._replace(text=self.embed(flow.text))


class TextBlock(Block):
    """Works on clean and masked captions alike: 2B rows in one pass."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__(config.width, config.heads)

    def forward(self, flow: Flow) -> Flow:
        return flow._replace(text=self.transform(flow.text, flow.text_mask))


def pool_image(image: Tensor) -> Tensor:
    """(B, P, D) -> (B, D): the mean over patches."""
    return image.mean(dim=1)


def pool_text(text: Tensor) -> Tensor:
    """(R, L, D) -> (R, D): the token at [CLS]."""
    return text[:, 0]
