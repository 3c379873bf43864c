"""How an image is looked at: a random crop, keyed by the sample's position and varied, or the centre as it is."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipelines.config import AugmentConfig
from data_pipelines.randomness import Purpose, uniform
from data_pipelines.samples.distort import distort

_MAX_DISTORTION = 4 / 3  # of the crop's sides, as in the usual random-resized crop
# Words that begin with left or right, such as left-hand and rightmost, but not bright and upright. A word of another
# meaning costs nothing: its image is not flipped.
_SIDE = re.compile(r"(?<![^\W_])(?:top|bottom|upper|lower)?(?:left|right)|[左右]", re.IGNORECASE)


class Box(NamedTuple):
    """A rectangle of pixels, and whether to mirror it."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied, each by its position alone.

    Args:
        crop_scale: Share of the image's area that a crop covers, from and to.
        flip: Mirror half of the images whose captions name no side.
        config: What is done to the crop.
        seed: Of the run.
    """

    crop_scale: tuple[float, float]
    flip: bool
    config: AugmentConfig
    seed: int

    def box(self, height: int, width: int, *, position: int, caption: str) -> Box:
        """The part of an image of `height` x `width` pixels that is looked at."""
        box = random_box(height, width, scale=self.crop_scale, flip=self.flip, seed=self.seed, position=position)
        return box._replace(flip=False) if box.flip and _SIDE.search(caption) else box

    def distorted(self, pixels: np.ndarray, *, position: int) -> np.ndarray:
        """The crop as it is to be seen; both (size, size, 3) uint8."""
        return distort(pixels, self.config, seed=self.seed, position=position)


def random_box(height: int, width: int, *, scale: tuple[float, float], flip: bool, seed: int, position: int) -> Box:
    """A crop that covers a uniformly drawn share of the area, with a log-uniform aspect.

    The aspect is drawn among those with which the share fits into the image, so nothing is rejected and every
    sample takes the same few numbers. Only in images far from square does the crop cover less than its share.

    Source: Szegedy et al., Going deeper with convolutions (2015), section 6.
    """
    share, aspect, down, across, mirror = uniform(seed, Purpose.AUGMENTATION, position, size=5).tolist()
    share = scale[0] + share * (scale[1] - scale[0])
    lowest = max(1 / _MAX_DISTORTION, share * width / height)
    highest = min(_MAX_DISTORTION, width / (share * height))
    if lowest <= highest:
        ratio = math.exp(math.log(lowest) + aspect * math.log(highest / lowest))
    else:
        ratio = min(max(width / height, 1 / _MAX_DISTORTION), _MAX_DISTORTION)
    area = min(share * height * width, height**2 * ratio, width**2 / ratio)
    box_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    box_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    return Box(
        int(down * (height - box_height + 1)),
        int(across * (width - box_width + 1)),
        box_height,
        box_width,
        flip and mirror < 0.5,
    )


def centre_box(height: int, width: int) -> Box:
    """The central square: the same as resizing the short side and cropping the centre."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)
