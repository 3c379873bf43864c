"""Architectures: functions from the config to an ordered list of layers.

The list is the model. ZeRO runs all of it in one process group, a pipeline runs slices of the same list.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from pretrain.collectives import Group
from pretrain.config import Config, ModelConfig
from pretrain.models.align import Align, AlignAndMine
from pretrain.models.fusion import FusionBlock, MaskedLMHead, MatchingHead
from pretrain.models.towers import ImageBlock, ImageEmbed, ImageNorm, TextBlock, TextEmbed


class LayerSpec(NamedTuple):
    """A layer before it is built: its name, the first part of its parameters' canonical names, and how to build it."""

    name: str
    build: Callable[[], nn.Module]


def layer_specs(
    config: Config, vocabulary: int, group: Group = None, vocabulary_group: Group = None
) -> list[LayerSpec]:
    """The layers of the configured architecture, in order.

    Args:
        config: the whole config; the architecture takes part of it.
        vocabulary: tokens of the tokenizer.
        group: ranks whose samples are contrastive negatives, handed through to the objective.
        vocabulary_group: ranks that the vocabulary is cut over, handed through to the masked-LM objective.
    """
    match config.model.architecture:
        case "cross_attention":
            return _cross_attention(config, vocabulary, group, vocabulary_group)
        case "dual_encoder":
            return _dual_encoder(config, vocabulary, group)


def _cross_attention(config: Config, vocabulary: int, group: Group, vocabulary_group: Group) -> list[LayerSpec]:
    """Two towers, then text blocks that look at the image. Source: ALBEF, section 3.1."""
    model, objectives = config.model, config.objectives
    assert model.fusion is not None
    matching, masked_lm = objectives.matching, objectives.masked_lm
    align = partial(
        AlignAndMine,
        model,
        group,
        sigmoid=objectives.contrastive.loss == "sigmoid",
        pool=matching.pool if matching else None,
        pool_group=group if matching and matching.pool > config.data.grain else None,
        masked=masked_lm is not None,
        seed=config.seed,
    )
    specs = [*_towers(model, vocabulary), LayerSpec("align", align)]
    specs += [LayerSpec(f"fusion_block_{i}", partial(FusionBlock, model)) for i in range(model.fusion.depth)]
    if matching:
        specs.append(LayerSpec("matching_head", partial(MatchingHead, model.text.width)))
    if masked_lm:
        head = partial(MaskedLMHead, model.text.width, vocabulary, vocabulary_group)
        specs.append(LayerSpec("masked_lm_head", head))
    return specs


def _dual_encoder(config: Config, vocabulary: int, group: Group) -> list[LayerSpec]:
    """Two towers that meet in the loss alone. Source: CLIP, section 2."""
    align = partial(Align, config.model, group, sigmoid=config.objectives.contrastive.loss == "sigmoid")
    return [*_towers(config.model, vocabulary), LayerSpec("align", align)]


def _towers(model: ModelConfig, vocabulary: int) -> list[LayerSpec]:
    return [
        LayerSpec("image_embed", partial(ImageEmbed, model.image)),
        *[LayerSpec(f"image_block_{i}", partial(ImageBlock, model.image)) for i in range(model.image.depth)],
        LayerSpec("image_norm", partial(ImageNorm, model.image)),
        LayerSpec("text_embed", partial(TextEmbed, model.text, vocabulary)),
        *[LayerSpec(f"text_block_{i}", partial(TextBlock, model.text)) for i in range(model.text.depth)],
    ]
