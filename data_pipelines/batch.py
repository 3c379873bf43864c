"""The contract between the data pipelines and the trainer.

Shapes: B samples of this micro-batch on this rank, H x W pixels, L text length, K masked slots per caption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # target of a masked slot that is not used

# Column class -> the tensors that it gives, one row per sample. Columns run in this order, each over several samples at
# once, which takes half the time: its data stay in the processor's cache. Images come last of what can be bad.
COLUMNS: dict[str, tuple[str, ...]] = {
    # text: (B, L) int64, [CLS] pieces [SEP], padded with the tokenizer's pad id
    "data_pipelines.samples.columns.CaptionColumn": ("text",),
    # masked_text: (B, L) int64, `text` after corruption for masked language modelling
    # masked_positions: (B, K) int64, places in the caption to predict; 0 where the slot is unused
    # masked_targets: (B, K) int64, the token that stood there; IGNORE where the slot is unused
    "data_pipelines.samples.columns.MaskedCaptionColumn": ("text", "masked_text", "masked_positions", "masked_targets"),
    # images: (B, 3, H, W) uint8; normalised on the device
    "data_pipelines.samples.columns.ImageColumn": ("images",),
    # positions: (B,) int64, global sample position, unique over the run; the key of all randomness
    # image_ids: (B,) int64, hash of the image's bytes
    # caption_ids: (B,) int64, hash of the caption after lower-casing and joining white space
    "data_pipelines.samples.columns.IdColumn": ("positions", "image_ids", "caption_ids"),
}
IDS = ("positions", "image_ids", "caption_ids")  # in every batch, whether the model reads them or not


def known_tensors() -> set[str]:
    """All that a batch can hold."""
    return {name for given in COLUMNS.values() for name in given}


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used; another of its window stands in its place."""

    shard: str  # as messages show it
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

    tensors: dict[str, Tensor]  # what the model reads, and `IDS`; see `COLUMNS`
    bad: tuple[BadSample, ...] = ()  # samples that had to be replaced while this batch was made
    records: tuple[Record, ...] = ()  # held-out batches only, one per sample

    def __len__(self) -> int:
        return len(self.tensors["positions"])

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; copies from pinned memory do not wait."""
        return replace(self, tensors={name: t.to(device, non_blocking=True) for name, t in self.tensors.items()})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the hook that torch's DataLoader calls)."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})
