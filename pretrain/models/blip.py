"""BLIP: an image tower, and one stack of text blocks that reads captions, judges pairs and writes captions.

    images --> image tower --> image_tokens --> image_project -----------------+
                                    |                                          |
    mining, of the first pass --> pair_up, see                         contrastive_head, mining
                                    |                                          |
    captions --> med blocks over rows [text; encoder; decoder]                 |
                                        |       |        +--> caption_head     |     [DEC] caption, causal
                                        |       +--> matching_head             |     [ENC] captions of pairs
                                        +--> text_project ---------------------+     captions by themselves

One pass serves all three. Text rows see no image; encoder and decoder rows share all weights but self-attention's.
Negatives are found by the similarity of what the stack's top says of text rows, and enter at its bottom as encoder
rows: so they come from a first pass over images and text rows, without gradient. They are exact, as it has the same
weights. Source: Li et al., BLIP (2022), sections 3.1 and 3.2; without its momentum teacher.
"""

from functools import partial

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.blocks import MLP, CrossAttention, SelfAttention
from pretrain.models.heads import captioning, contrast, matching, objectives_of
from pretrain.models.layer import Architecture, Groups, Layer, Rows, Spans, join, split
from pretrain.models.pairs import mining, own_images, pair_up, see
from pretrain.models.towers import TextEmbed, Vocabulary, image_tower
from pretrain.objectives.captioning import count_targets

MED = Rows("med", {"text": 1, "encoder": 3, "decoder": 1})
LOOKING = ("encoder", "decoder")  # neighbours in MED


class MedEmbed(TextEmbed):
    """Token ids to text tokens; two ids behind the vocabulary, [ENC] and [DEC], take the place of [CLS]."""

    def __init__(self, width: int, length: int, vocabulary: Vocabulary) -> None:
        super().__init__(width, length, vocabulary._replace(size=vocabulary.size + len(LOOKING)))
        self.first = {kind: vocabulary.size + i for i, kind in enumerate(LOOKING)}

    def forward(self, ids: Tensor, *, spans: Spans) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(R, L) int64 -> (R, L, D) tokens, and the mask of what each of them sees: all but padding."""
        ids = ids.clone()
        for kind in spans.keys() & self.first.keys():
            ids[spans[kind], 0] = self.first[kind]
        return super().forward(ids)


class MedBlock(nn.Module):
    """Pre-norm block of the mixture of encoder and decoder."""

    def __init__(self, width: int, heads: int, *, stack: int, memory_width: int | None, decoder: bool) -> None:
        """
        Args:
            width: of tokens.
            heads: of each attention.
            stack: as of Block.
            memory_width: of images; None if no row looks at any.
            decoder: whether there are decoder rows.
        """
        super().__init__()
        self.stack = stack
        self.encoder_norm = nn.LayerNorm(width)
        self.encoder_attention = SelfAttention(width, heads)
        if decoder:
            self.decoder_norm = nn.LayerNorm(width)
            self.decoder_attention = SelfAttention(width, heads, causal=True)
        if memory_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross = CrossAttention(width, memory_width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Tensor, mask: Tensor, images: Tensor | None = None, image: Tensor | None = None, *, spans: Spans
    ) -> Tensor:
        """(R, L, D) -> (R, L, D).

        Args:
            x: tokens of the rows of `spans`.
            mask: what tokens of text and encoder rows see.
            images: (B or 2B, P, memory width).
            image: (R,) which of them a row looks at, if it looks.
            spans: where the rows of each kind lie.
        """
        first = spans["decoder"].start if "decoder" in spans else len(x)
        attended = []
        if first > 0:
            attended.append(self.encoder_attention(self.encoder_norm(x[:first]), mask[:first]))
        if first < len(x):
            attended.append(self.decoder_attention(self.decoder_norm(x[first:])))
        x = x + torch.cat(attended)
        if images is not None and image is not None:
            first = min(spans[kind].start for kind in spans.keys() & set(LOOKING))
            looking = x[first:] + self.cross(self.cross_norm(x[first:]), images, image[first:])
            x = torch.cat([x[:first], looking])
        return x + self.mlp(self.mlp_norm(x))


def architecture(config: Config, vocabulary: Vocabulary, groups: Groups) -> Architecture:
    """The configured model's layers and objectives."""
    model, objectives = config.model, config.objectives
    text, width = model.text, model.text.width
    looks = objectives.matching or objectives.captioning
    block = partial(
        MedBlock,
        width,
        text.heads,
        stack=text.depth,
        memory_width=model.image.width if looks else None,
        decoder=objectives.captioning is not None,
    )
    image_project, *others = contrast(config, "caption_tokens", groups.samples)
    layers = [*image_tower(model.image), image_project, own_images("own_image")]
    if objectives.matching:
        pool = objectives.matching.pool
        layers += [
            pair_up(config, pool, groups.samples, ("text",)),
            see(config, pool, groups.samples, MED, "encoder"),
        ]
    images = "seen" if objectives.matching else "image_tokens"
    reads = ("med_tokens", "med_mask", images, "med_image")
    only = {images: LOOKING, "med_image": LOOKING}
    layers += [
        join(
            MED,
            ("med_ids", "med_image"),
            text=("text", "own_image"),
            encoder=("pairs/text", "pairs/image"),
            decoder=("text", "own_image"),
        ),
        Layer(
            "text_embed",
            partial(MedEmbed, width, text.length, vocabulary),
            ("med_ids",),
            ("med_tokens", "med_mask"),
            rows=MED,
        ),
        *(
            Layer(f"med_block_{i}", block, reads, ("med_tokens",), recompute=True, rows=MED, only=only)
            for i in range(text.depth)
        ),
        split(MED, ("med_tokens",), text=("caption_tokens",), encoder=("encoder_tokens",), decoder=("decoded",)),
        *others,
    ]
    if objectives.matching:
        layers += [
            mining(config, objectives.matching.pool, groups.samples, prior=True),
            *matching(width, "encoder_tokens"),
        ]
    if objectives.captioning:
        layers += captioning(objectives.captioning, width, vocabulary, "decoded", "text", groups.shards)
    return Architecture(layers, objectives_of(objectives, captioning=partial(count_targets, pad=vocabulary.pad)))
