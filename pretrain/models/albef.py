"""ALBEF: two towers, then text blocks that look at the image. Without its momentum teacher.

    images --> image tower --> image_tokens --> image_project --\
                                    |                            contrastive_head, mining
    captions, masked captions --> text tower --> text_project --/      | negative_images, negative_texts
                                    |                              pair_up, see
                                    |                                  | pairs/..., seen
                                    +--> fusion blocks over [pairs; masked captions], looking at the images
                                              |--> matching_head     (pairs)
                                              +--> masked_lm_head    (masked captions)

The text tower runs once over clean and masked captions, the fusion blocks once over pairs and masked captions. Of pairs
there are three per sample: caption and image as they are, with another image, with another caption. A fusion block is
self-attention, cross-attention from a row's tokens to its image's, and an MLP; names that end in `image` say which of
the images a row looks at. Kinds of rows that no objective wants do not run.
Source: Li et al., Align before fuse (2021), sections 3.1 and 3.2.
"""

from functools import partial

from pretrain.config import Config
from pretrain.models.blocks import Block
from pretrain.models.heads import contrast, masked_lm, matching, objectives_of
from pretrain.models.layer import Architecture, Groups, Layer, Rows, join, split
from pretrain.models.pairs import mining, own_images, pair_up, see
from pretrain.models.towers import Vocabulary, image_tower, text_tower

CAPTIONS = Rows("captions", {"clean": 1, "masked": 1})
FUSED = Rows("fused", {"pairs": 3, "masked": 1})


def architecture(config: Config, vocabulary: Vocabulary, groups: Groups) -> Architecture:
    """The configured model's layers and objectives."""
    model, objectives = config.model, config.objectives
    assert model.fusion
    width, stack = model.text.width, model.text.depth + model.fusion.depth
    block = partial(Block, width, model.fusion.heads, stack=stack, memory_width=model.image.width)
    layers = [
        *image_tower(model.image),
        join(CAPTIONS, ("ids",), clean=("text",), masked=("masked_text",)),
        *text_tower(model.text, vocabulary, "ids", stack),
        split(
            CAPTIONS,
            ("text_tokens", "text_mask"),
            clean=("caption_tokens", "caption_mask"),
            masked=("masked_tokens", "masked_mask"),
        ),
        *contrast(config, "caption_tokens", groups.samples),
    ]
    if objectives.matching:
        layers += [
            mining(config, objectives.matching.pool, groups.samples),
            pair_up(config, objectives.matching.pool, groups.samples, ("caption_tokens", "caption_mask")),
            see(config, objectives.matching.pool, groups.samples, FUSED, "pairs"),
        ]
    if objectives.masked_lm:
        layers.append(own_images("own_image"))
    images = "seen" if objectives.matching else "image_tokens"
    reads = ("fused_tokens", "fused_mask", images, "fused_image")
    layers += [
        join(
            FUSED,
            ("fused_tokens", "fused_mask", "fused_image"),
            pairs=("pairs/caption_tokens", "pairs/caption_mask", "pairs/image"),
            masked=("masked_tokens", "masked_mask", "own_image"),
        ),
        *(
            Layer(f"fusion_block_{i}", block, reads, ("fused_tokens",), recompute=True)
            for i in range(model.fusion.depth)
        ),
        split(FUSED, ("fused_tokens",), pairs=("fused_pairs",), masked=("fused_masked",)),
    ]
    if objectives.matching:
        layers += matching(width, "fused_pairs")
    if objectives.masked_lm:
        layers.append(masked_lm(width, vocabulary.size, "fused_masked", groups.shards))
    return Architecture(layers, objectives_of(objectives))
