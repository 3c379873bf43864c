"""ViLT: one stream, in which captions and patches see each other from the first block on.

    images --> image tower --> image_tokens --> see -------------------+
                                                                       |
    captions, masked captions --> text tower --> pair_at_random --> one_stream over rows [pairs; masked captions]
                                                                       |
                                                                  joint blocks
                                                                       |--> matching_head     (pairs)
                                                                       +--> masked_lm_head    (masked captions)

The towers have no blocks of their own unless the config says so: what goes into the stream are patches and pieces, each
with its place. A row is a caption and, behind it, an image: a pair's own one in half of the pairs, else a random one.
Source: Kim et al., ViLT (2021), sections 3.1 and 3.2; without its word-patch alignment.
"""

from functools import partial

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.blocks import Block
from pretrain.models.heads import masked_lm, matching, objectives_of
from pretrain.models.layer import Architecture, Groups, Layer, Rows, join, split
from pretrain.models.pairs import own_images, pair_at_random, see
from pretrain.models.towers import Vocabulary, image_tower, text_tower

CAPTIONS = Rows("captions", {"clean": 1, "masked": 1})
JOINT = Rows("joint", {"pairs": 1, "masked": 1})


class OneStream(nn.Module):
    """Lays a caption and an image into each row, and adds to each token of which of the two it is.

    Shapes: R rows, B images that are seen, L text length, P patches, D width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modality = nn.Parameter(torch.empty(2, width))

    def forward(self, text: Tensor, mask: Tensor, images: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L, D), (R, 1, 1, L), (B, P, D), (R,) image of each row -> (R, L + P, D), (R, 1, 1, L + P)."""
        patches = (images + self.modality[1])[image]  # (R, P, D)
        seen = mask.new_ones(1, 1, 1, patches.shape[1]).expand(len(mask), -1, -1, -1)
        return torch.cat([text + self.modality[0], patches], dim=1), torch.cat([mask, seen], dim=3)


def architecture(config: Config, vocabulary: Vocabulary, groups: Groups) -> Architecture:
    """The configured model's layers and objectives."""
    model, objectives = config.model, config.objectives
    assert model.joint
    width, stack = model.text.width, model.text.depth + model.joint.depth
    block = partial(Block, width, model.joint.heads, stack=stack)
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
    ]
    if objectives.matching:
        layers += [
            pair_at_random(config, objectives.matching.pool, groups.samples, ("caption_tokens", "caption_mask")),
            see(config, objectives.matching.pool, groups.samples, JOINT, "pairs"),
        ]
    if objectives.masked_lm:
        layers.append(own_images("own_image"))
    images = "seen" if objectives.matching else "image_tokens"
    layers += [
        join(
            JOINT,
            ("row_tokens", "row_mask", "row_image"),
            pairs=("pairs/caption_tokens", "pairs/caption_mask", "pairs/image"),
            masked=("masked_tokens", "masked_mask", "own_image"),
        ),
        Layer(
            "one_stream",
            partial(OneStream, width),
            ("row_tokens", "row_mask", images, "row_image"),
            ("joint_tokens", "joint_mask"),
        ),
        *(
            Layer(f"joint_block_{i}", block, ("joint_tokens", "joint_mask"), ("joint_tokens",), recompute=True)
            for i in range(model.joint.depth)
        ),
        split(JOINT, ("joint_tokens",), pairs=("joint_pairs",), masked=("joint_masked",)),
    ]
    if objectives.matching:
        layers += matching(width, "joint_pairs")
    if objectives.masked_lm:
        layers.append(masked_lm(width, vocabulary.size, "joint_masked", groups.shards))
    return Architecture(layers, objectives_of(objectives))
