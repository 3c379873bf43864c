"""The contract between the data pipelines and the trainer.

Shapes: B samples of this micro-batch on this rank, H x W pixels, L text length, K masked slots a caption.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

COLUMNS = (
    *("images", "text", "masked_text", "masked_positions", "masked_targets"),
    *("positions", "image_ids", "caption_ids"),
)
IGNORE = -100  # a masked slot that is not used; the target that cross-entropy skips


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used; another of its window stands in its place."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Record:
    """What a person, rather than the model, reads of a held-out sample."""

    key: str
    caption: str
    metadata: dict[str, object]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank. Ranks that differ only in tp or pp hold equal batches."""

    images: Tensor  # (B, 3, H, W) uint8; normalised on the device
    text: Tensor  # (B, L) int64: [CLS] pieces [SEP], padded with the tokenizer's pad id
    masked_text: Tensor  # (B, L) int64: `text` after corruption for masked language modelling
    masked_positions: Tensor  # (B, K) int64: places in the caption to predict; 0 where the slot is unused
    masked_targets: Tensor  # (B, K) int64: the token that stood there; IGNORE where the slot is unused
    positions: Tensor  # (B,) int64: global sample position, unique over the run; the key of all randomness
    image_ids: Tensor  # (B,) int64: hash of the image's bytes
    caption_ids: Tensor  # (B,) int64: hash of the caption after lower-casing and joining white space
    bad: tuple[BadSample, ...] = ()  # samples that had to be replaced while this batch was made
    records: tuple[Record, ...] = ()  # held-out batches only, one a sample

    def __len__(self) -> int:
        return len(self.positions)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field's name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the hook that torch's DataLoader calls)."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors().items()})
