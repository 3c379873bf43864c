"""CLIP: two towers that meet in the contrastive loss alone, a softmax over all pairs or a sigmoid for each (SigLIP).

Source: Radford et al., Learning transferable visual models from natural language supervision (2021), section 2.
"""

from pretrain.config import Config
from pretrain.models.heads import contrast, objectives_of
from pretrain.models.layer import Architecture, Groups
from pretrain.models.towers import Vocabulary, image_tower, text_tower


def architecture(config: Config, vocabulary: Vocabulary, groups: Groups) -> Architecture:
    """The configured model's layers and objectives."""
    layers = [
        *image_tower(config.model.image),
        *text_tower(config.model.text, vocabulary, "text", stack=config.model.text.depth),
        *contrast(config, "text_tokens", groups.samples),
    ]
    return Architecture(layers, objectives_of(config.objectives))
