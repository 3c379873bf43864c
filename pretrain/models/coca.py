"""CoCa: two towers that are contrasted, and a decoder that goes on from the text tower and writes the caption.

    images --> image tower --> image_tokens --> pool_caption --> image_queries --> pool_contrast --> image_project --+
                                                                       |                               contrastive_head
    captions, [CLS] --> text tower --> class_apart --> class_token ---------------------> text_project --------------+
                                            |                          |
                                            +--> decoded --> decoder blocks, looking at image_queries --> caption_head

No token sees a later one, so that one pass over each caption serves both objectives: [CLS], a learned token behind the
caption, sees all of it and is seen by none.
Source: Yu et al., CoCa: Contrastive captioners are image-text foundation models (2022), section 3.2.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.blocks import Block, CrossAttention, sees
from pretrain.models.heads import captioning, contrast, objectives_of
from pretrain.models.layer import Architecture, Groups, Layer
from pretrain.models.towers import TextEmbed, Vocabulary, image_tower, text_tower
from pretrain.objectives.captioning import count_targets


class CaptionEmbed(TextEmbed):
    """Token ids to text tokens, with the learned [CLS] behind them, and what each of them sees."""

    def __init__(self, width: int, length: int, vocabulary: Vocabulary) -> None:
        super().__init__(width, length, vocabulary)
        self.class_token = nn.Parameter(torch.empty(1, width))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L) int64 -> (R, L + 1, D) tokens and (R, 1, L + 1, L + 1) bool."""
        tokens, _ = super().forward(ids)
        behind = self.class_token.expand(len(ids), 1, -1)
        # Padding is a document of its own: nobody else sees it, and no token is left without any that it sees.
        is_padding = F.pad(ids == self.pad, (0, 1)).long()
        place = torch.arange(is_padding.shape[1], device=ids.device).expand_as(is_padding)
        return torch.cat([tokens, behind], dim=1), sees(is_padding, place)


class ClassApart(nn.Module):
    """Takes [CLS] from behind the caption."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L + 1, D) -> (R, L, D), (R, 1, D)."""
        return tokens[:, :-1], tokens[:, -1:]


class Pooler(nn.Module):
    """Attentional pooling: learned queries, each of which becomes what it sees in the image."""

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        # As short as they start, queries would all see the mean, and become the same.
        self.query_norm = nn.LayerNorm(width)
        self.cross = CrossAttention(width, width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D), normed -> (B, Q, D), normed."""
        queries = self.query_norm(self.query).expand(len(tokens), -1, -1)
        return self.norm(self.cross(queries, tokens))


class DecoderBlock(Block):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(R, L, D) tokens, (R, Q, D) what they look at -> (R, L, D)."""
        return super().forward(x, None, memory)


def architecture(config: Config, vocabulary: Vocabulary, groups: Groups) -> Architecture:
    """The configured model's layers and objectives."""
    model, objectives = config.model, config.objectives
    assert model.decoder
    image, width, stack = model.image, model.text.width, model.text.depth + model.decoder.depth
    block = partial(DecoderBlock, width, model.decoder.heads, stack=stack, memory_width=image.width, causal=True)
    poolers = {
        name: partial(Pooler, image.width, image.heads, queries)
        for name, queries in (("caption", model.decoder.queries), ("contrast", 1))
    }
    reads = ("decoded", "image_queries")
    layers = [
        *image_tower(image),
        Layer("pool_caption", poolers["caption"], ("image_tokens",), ("image_queries",)),
        Layer("pool_contrast", poolers["contrast"], ("image_queries",), ("image_pooled",)),
        *text_tower(model.text, vocabulary, "text", stack, embed=CaptionEmbed),
        Layer("class_apart", ClassApart, ("text_tokens",), ("decoded", "class_token")),
        *contrast(config, "class_token", groups.samples, image_tokens="image_pooled"),
        *(Layer(f"decoder_block_{i}", block, reads, ("decoded",), True) for i in range(model.decoder.depth)),
    ]
    if objectives.captioning:
        layers += captioning(objectives.captioning, width, vocabulary, "decoded", "text", groups.shards)
    return Architecture(layers, objectives_of(objectives, captioning=partial(count_targets, pad=vocabulary.pad)))
