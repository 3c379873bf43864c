"""From a config to the list of layers that is its model."""

from importlib import import_module

from data_pipelines.batch import known_tensors
from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.model_config import ARCHITECTURES
from pretrain.models.layer import Architecture, Groups, WiringError, check
from pretrain.models.towers import Vocabulary

ALONE = Groups()


def architecture_of(config: Config, vocabulary: Vocabulary, groups: Groups = ALONE) -> Architecture:
    """The configured architecture, checked.

    Args:
        config: the whole config; the architecture takes part of it.
        vocabulary: the tokenizer's.
        groups: the ranks that some layers talk to.

    Raises:
        ConfigError: its layers do not hang together, as when a layer leads to no objective that is on.
    """
    name = config.model.architecture
    try:
        found = import_module(ARCHITECTURES[name].module).architecture(config, vocabulary, groups)
        check(found, known_tensors())
    except WiringError as error:
        raise ConfigError(f"model.architecture {name}: {error}.") from None
    return found
