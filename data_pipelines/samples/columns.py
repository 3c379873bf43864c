"""The columns of a batch: which members of a sample each needs, what can be wrong with them, and the rows it gives.

A new column is one class, in any module, and one line of `COLUMNS` in `batch.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import ClassVar, NamedTuple

import numpy as np

from data_pipelines.batch import COLUMNS, IDS
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, SampleError
from data_pipelines.samples.augment import Augmentation, centre_box
from data_pipelines.samples.decode import decode_crop
from data_pipelines.samples.masking import mask_words, num_masked_slots
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.shards.sample import IMAGE_EXTENSIONS, Sample, hash64, normalised_caption

Row = dict[str, np.ndarray]  # what a sample gives to each tensor of a batch, by its name


@dataclass(frozen=True)
class BatchSpec:
    """What a batch holds, and by what it is made."""

    config: DataConfig
    tokenizer: Tokenizer
    tensors: Collection[str]  # those that the model reads
    image_size: int  # side of the square images in pixels
    text_length: int  # tokens of a caption (L), [CLS] and [SEP] included
    mask_probability: float  # share of the pieces that masked language modelling hides
    seed: int  # keys all randomness, together with each sample's position


class Pair(NamedTuple):
    """A sample with one of its captions, at a position of the run or of the held-out split."""

    sample: Sample
    caption: str
    position: int


class Column(ABC):
    """Gives one row per pair to one or several tensors. Made in the trainer's process, and sent to its workers.

    Args:
        spec: What batches are to be.
        training: Whether samples are varied, or looked at as they are.
    """

    needs: ClassVar[tuple[str, ...]]
    """Extensions of members, of which a sample must have one."""
    gives: tuple[str, ...] = ()
    """Its line of `COLUMNS`."""

    def __init__(self, spec: BatchSpec, training: bool):
        self.spec, self.training = spec, training

    @abstractmethod
    def row(self, pair: Pair) -> Row:
        """One row of every tensor that it gives.

        Raises:
            SampleError: What the sample holds cannot be used.
        """


class CaptionColumn(Column):
    """Captions as ids."""

    needs = ("txt", "json")

    def __init__(self, spec: BatchSpec, training: bool):
        super().__init__(spec, training)
        if spec.text_length < 3:
            raise DataError(
                f"A text length of {spec.text_length} leaves no room between [CLS] and [SEP]: use 3 or more."
            )

    def row(self, pair: Pair) -> Row:
        return {"text": self.encode(pair)[0]}

    def encode(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """(L,) int64 ids of the caption, and (L,) bool, true where a word begins."""
        ids, word_starts = self.spec.tokenizer.encode(pair.caption, self.spec.text_length)
        if not word_starts.any():
            raise SampleError("caption has no tokens")
        return ids, word_starts


class MaskedCaptionColumn(CaptionColumn):
    """Captions as ids, and the same with words hidden."""

    def __init__(self, spec: BatchSpec, training: bool):
        super().__init__(spec, training)
        self.num_slots = num_masked_slots(spec.text_length, spec.mask_probability)

    def row(self, pair: Pair) -> Row:
        ids, word_starts = self.encode(pair)
        masked, positions, targets = mask_words(
            ids,
            word_starts,
            self.spec.tokenizer,
            seed=self.spec.seed,
            position=pair.position,
            probability=self.spec.mask_probability,
            num_slots=self.num_slots,
        )
        return {"text": ids, "masked_text": masked, "masked_positions": positions, "masked_targets": targets}


class ImageColumn(Column):
    """Pixels: a varied crop in training, else the central square."""

    needs = IMAGE_EXTENSIONS

    def __init__(self, spec: BatchSpec, training: bool):
        super().__init__(spec, training)
        config = spec.config
        self.augmentation = Augmentation(config.crop_scale, config.flip, config.augment, spec.seed)

    def row(self, pair: Pair) -> Row:
        choose_box = centre_box
        if self.training:
            choose_box = partial(self.augmentation.box, position=pair.position, caption=pair.caption)
        turn = self.spec.config.exif_orientation
        pixels = decode_crop(pair.sample.image, choose_box, self.spec.image_size, exif_orientation=turn)
        if self.training:
            pixels = self.augmentation.distorted(pixels, position=pair.position)
        return {"images": pixels.transpose(2, 0, 1)}  # a view, whose order in memory np.stack keeps


class IdColumn(Column):
    """What tells samples apart, and repeated images and captions."""

    needs = IMAGE_EXTENSIONS

    def row(self, pair: Pair) -> Row:
        return {
            "positions": np.array(pair.position),
            "image_ids": hash64(pair.sample.image, "<i8"),
            "caption_ids": hash64(normalised_caption(pair.caption), "<i8"),
        }


def open_columns(spec: BatchSpec, training: bool) -> list[Column]:
    """The columns that give `spec.tensors` and `IDS`, in their order; none whose tensors the others give.

    Raises:
        DataError: A line of `COLUMNS` names no class, or a class cannot do what the spec asks.
    """
    wanted, chosen = {*spec.tensors, *IDS}, list(COLUMNS)
    for name, given in sorted(COLUMNS.items(), key=lambda line: -len(line[1])):  # the widest goes first
        others = {tensor for other in chosen if other != name for tensor in COLUMNS[other]}
        if others.issuperset(wanted.intersection(given)):
            chosen.remove(name)
    return [_open(name, spec, training) for name in chosen]


def _open(name: str, spec: BatchSpec, training: bool) -> Column:
    module, _, kind = name.rpartition(".")
    try:
        made_by = getattr(import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"data_pipelines/batch.py says that {name} gives {', '.join(COLUMNS[name])}, and there is no such class "
            f"({error}): write it, or remove its line."
        ) from None
    column = made_by(spec, training)
    column.gives = COLUMNS[name]
    return column
