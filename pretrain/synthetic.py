"""Made-up batches: every column, each sample a function of its position alone.

Shapes: B samples, L text length, K masked slots.
"""

import math

import torch
from torch import Tensor

from data_pipelines.batch import IGNORE
from data_pipelines.samples.masking import num_masked_slots
from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Flow
from pretrain.models.towers import Vocabulary
from pretrain.objectives.noise import hashed

FIRST_PIECE = 5  # below are the tokens that are no pieces, [CLS] and [MASK] among them
CLS, MASK = 2, 4


def made_up_batch(config: Config, vocabulary: Vocabulary, positions: Tensor) -> Flow:
    """Samples for these positions, (B,) int64, on their device; meta gives the shapes alone.

    Two of eight neighbours share an image. Captions are of all lengths, and some masked slots are not used.
    """
    side, length, masked_lm = config.model.image.size, config.model.text.length, config.objectives.masked_lm
    slots = num_masked_slots(length, masked_lm.probability if masked_lm else 0.15)
    images = _draw(positions, 0, 3, side, side) % 256
    pieces = FIRST_PIECE + _draw(positions, 1, length) % (vocabulary.size - FIRST_PIECE)
    place = torch.arange(length, device=positions.device)
    used = 3 + _draw(positions, 2, 1) % (length - 2)
    text = torch.where(place == 0, CLS, torch.where(place < used, pieces, vocabulary.pad))
    masked_positions = (1 + torch.arange(slots, device=positions.device)).clamp(max=length - 2).expand(len(text), -1)
    last_is_unused = (positions % 3 == 0)[:, None] & (torch.arange(slots, device=positions.device) == slots - 1)
    hidden = (masked_positions < used - 1) & ~last_is_unused
    made = {
        "images": images.to(torch.uint8),
        "text": text,
        "masked_text": torch.where((place > 0) & (place <= slots) & (place < used), MASK, text),
        "masked_positions": torch.where(hidden, masked_positions, 0),
        "masked_targets": torch.where(hidden, text.gather(1, masked_positions), IGNORE),
        "positions": positions,
        "image_ids": torch.where(positions % 8 < 2, positions // 8, -1 - positions),
        "caption_ids": positions,
    }
    if missing := architecture_of(config, vocabulary).columns - made.keys():
        raise ConfigError(
            f"model.architecture {config.model.architecture} reads {min(missing)}, and pretrain/synthetic.py makes up "
            f"no values of it, which the doctor and the planner need: add them there."
        )
    return made


def _draw(positions: Tensor, purpose: int, *shape: int) -> Tensor:
    """(B, *shape) int64 at or above 0."""
    numbers = torch.arange(math.prod(shape), device=positions.device).view(1, *shape)
    return hashed(purpose, positions.view(-1, *(1 for _ in shape)), numbers) & (2**62 - 1)
