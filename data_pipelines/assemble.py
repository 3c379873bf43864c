"""One sample to arrays, and arrays to a micro-batch: the unit of work that training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from data_pipelines.augment import Augmentation, centre_box
from data_pipelines.batch import BadSample, Batch, Record
from data_pipelines.decode import decode_crop
from data_pipelines.errors import DataError, SampleError
from data_pipelines.masking import mask_words, num_masked_slots
from data_pipelines.randomness import Purpose, uniform
from data_pipelines.sample import Sample, hash64, normalised_caption
from data_pipelines.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # what a sample gives to each tensor of a batch, by its field's name
Result = TypeVar("Result")


class _Captioned(NamedTuple):
    """A sample on its way, all but its image."""

    sample: Sample
    position: int
    caption: str
    row: Row


@dataclass(frozen=True)
class Assembler:
    """Turns samples into the tensors of a `Batch`.

    Args:
        tokenizer: Of the run.
        image_size: Side of the square images in pixels.
        text_length: Tokens of a caption (L), [CLS] and [SEP] included.
        mask_probability: Share of the pieces that masked language modelling hides.
        seed: Of the run; keys the masks, together with each sample's position.
        exif_orientation: Whether images are turned as their EXIF orientation says.
        augmentation: Of training images; without one, the central square is looked at as it is.
    """

    tokenizer: Tokenizer
    image_size: int
    text_length: int
    mask_probability: float
    seed: int
    exif_orientation: bool
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.text_length < 3:
            raise DataError(
                f"A text length of {self.text_length} leaves no room between [CLS] and [SEP]: use 3 or more."
            )

    @property
    def num_slots(self) -> int:
        """Masked slots of a caption (K)."""
        return num_masked_slots(self.text_length, self.mask_probability)

    def rows(self, samples: Sequence[Sample | SampleError], positions: Iterable[int]) -> list[Row | SampleError]:
        """`row` of each sample, with an error in the place of one that cannot be used.

        All captions come before all images: what the processor still has in its cache takes half the time.
        """
        found = [
            sample if isinstance(sample, SampleError) else _or_error(self._captioned, sample, position)
            for sample, position in zip(samples, positions, strict=True)
        ]
        return [item if isinstance(item, SampleError) else _or_error(self._with_image, item) for item in found]

    def row(self, sample: Sample, position: int) -> Row:
        """One row of every tensor of a batch.

        Raises:
            SampleError: The image or the caption cannot be used.
        """
        return self._with_image(self._captioned(sample, position))

    def _captioned(self, sample: Sample, position: int) -> _Captioned:
        caption = self._caption(sample, position)
        ids, word_starts = self.tokenizer.encode(caption, self.text_length)
        if not word_starts.any():
            raise SampleError("caption has no tokens")
        masked, positions, targets = mask_words(
            ids,
            word_starts,
            self.tokenizer,
            seed=self.seed,
            position=position,
            probability=self.mask_probability,
            num_slots=self.num_slots,
        )
        row: Row = {
            "text": ids,
            "masked_text": masked,
            "masked_positions": positions,
            "masked_targets": targets,
            "positions": np.array(position),
            "caption_ids": hash64(normalised_caption(caption), "<i8"),
        }
        return _Captioned(sample, position, caption, row)

    def _with_image(self, found: _Captioned) -> Row:
        image, augmentation = found.sample.image, self.augmentation
        choose_box = centre_box
        if augmentation:
            choose_box = partial(augmentation.box, position=found.position, caption=found.caption)
        pixels = decode_crop(image, choose_box, self.image_size, exif_orientation=self.exif_orientation)
        if augmentation:
            pixels = augmentation.distorted(pixels, position=found.position)
        return found.row | {
            "images": pixels.transpose(2, 0, 1),  # a view; np.stack, too, leaves the pixels as they lie
            "image_ids": hash64(image, "<i8"),
        }

    def _caption(self, sample: Sample, position: int) -> str:
        captions = sample.captions()
        if len(captions) == 1 or not self.augmentation:
            return captions[0]
        return captions[int(uniform(self.seed, Purpose.CAPTION, position, size=1)[0] * len(captions))]


def collate(rows: Sequence[Row], bad: Sequence[BadSample] = (), records: Sequence[Record] = ()) -> Batch:
    """Stacks rows into a micro-batch."""
    tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return Batch(**tensors, bad=tuple(bad), records=tuple(records))


def _or_error(step: Callable[..., Result], *arguments: object) -> Result | SampleError:
    try:
        return step(*arguments)
    except SampleError as error:
        return error
