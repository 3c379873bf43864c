"""From a config to what a batch holds: what the architecture reads, in the sizes of the model."""

from data_pipelines.errors import named
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer
from pretrain.config import Config
from pretrain.models.architectures import architecture_of
from pretrain.models.towers import Vocabulary


def batch_spec(config: Config) -> BatchSpec:
    """What batches of this config hold.

    Raises:
        DataError: the tokenizer cannot be used.
        ConfigError: the model's layers do not hang together.
    """
    masked_lm = config.objectives.masked_lm
    with named("data.tokenizer"):
        tokenizer = Tokenizer.load(config.data.tokenizer)
    return BatchSpec(
        config.data,
        tokenizer,
        architecture_of(config, vocabulary_of(tokenizer)).columns,
        image_size=config.model.image.size,
        text_length=config.model.text.length,
        mask_probability=masked_lm.probability if masked_lm else 0,
        seed=config.seed,
    )


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What the model has to know of a tokenizer."""
    return Vocabulary(tokenizer.vocab_size, tokenizer.pad_id)
