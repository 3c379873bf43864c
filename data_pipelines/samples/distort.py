"""What is done to the pixels of a training image after the crop: RandAugment, colour jitter and blur, in this order.

Images are (height, width, 3) uint8 RGB, before and after; none is changed in place. Every draw is keyed by the sample's
position, and each of the three has numbers of its own, so that switching one on changes nothing about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from data_pipelines.config import AugmentConfig
from data_pipelines.randomness import Purpose, uniform

_GREY = (128, 128, 128, 255)  # where an operation moves pixels in from outside
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey


def distort(pixels: np.ndarray, config: AugmentConfig, *, seed: int, position: int) -> np.ndarray:
    """The image as the sample at `position` of the run is to be seen."""
    if config.rand_augment:
        pixels = rand_augment(pixels, *config.rand_augment, seed=seed, position=position)
    if config.color_jitter:
        draws = uniform(seed, Purpose.COLOR_JITTER, position, size=3)
        pixels = jitter(pixels, *(1 + config.color_jitter * (2 * draws - 1)).tolist())
    if config.gaussian_blur:
        chance, width = uniform(seed, Purpose.BLUR, position, size=2).tolist()
        if chance < config.gaussian_blur:
            pixels = blur(pixels, (0.1 + 1.9 * width) * pixels.shape[0] / 224)
    return pixels


def rand_augment(pixels: np.ndarray, operations: int, magnitude: int, *, seed: int, position: int) -> np.ndarray:
    """Draws `operations` of ten, some perhaps twice, and applies each of them with a probability of one half.

    The magnitude m, from 0 to 10, means a shear by 0.03 m, a translation by m pixels, a rotation by 3 m degrees, all
    of these either way, and brightness or sharpness scaled by 0.1 + 0.18 m: 5 leaves those two as they are, and 0 is
    almost black. The other three, identity, autocontrast and equalize, have no magnitude.

    Source: ALBEF's released code (Li et al., Align before Fuse, 2021, section 3.5), which took out those operations of
    Cubuk et al., RandAugment (2020), that change what a caption may say of colours.
    """
    for kind, chance, sign in (
        uniform(seed, Purpose.RAND_AUGMENT, position, size=3 * operations).reshape(-1, 3).tolist()
    ):
        if chance < 0.5:
            level = magnitude / 10 if sign < 0.5 else -magnitude / 10
            pixels = OPERATIONS[int(kind * len(OPERATIONS))](pixels, level)
    return pixels


def jitter(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scales brightness, then the distance from the mean grey, then the distance of each pixel from its own grey.

    The three are one linear map of the colours, so that nothing is clipped on the way.
    """
    grey = float(_LUMA @ cv2.mean(pixels)[:3])
    mixing = saturation * np.eye(3) + (1 - saturation) * _LUMA
    # Neither the mean grey nor any other grey is changed by the mixing.
    matrix = np.column_stack([brightness * contrast * mixing, np.full(3, brightness * (1 - contrast) * grey)])
    return cv2.transform(pixels, matrix)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a standard deviation of `sigma` pixels."""
    return cv2.GaussianBlur(pixels, (0, 0), sigma)


def _identity(pixels: np.ndarray, level: float) -> np.ndarray:
    return pixels


def autocontrast(pixels: np.ndarray, level: float) -> np.ndarray:
    """Stretches each channel from 0 to 255, as Pillow does."""
    tables = []
    for counts in _histograms(pixels):
        found = np.flatnonzero(counts)
        low, high = int(found[0]), int(found[-1])
        scale = 255 / (high - low) if high > low else 1
        offset = -low * scale if high > low else 0
        tables.append(np.clip(np.trunc(np.arange(256) * scale + offset), 0, 255))
    return _look_up(pixels, tables)


def equalize(pixels: np.ndarray, level: float) -> np.ndarray:
    """Makes all values of a channel equally frequent, as Pillow does."""
    tables = []
    for counts in _histograms(pixels):
        step = (pixels[..., 0].size - int(counts[np.flatnonzero(counts)[-1]])) // 255
        before = np.cumsum(counts) - counts
        tables.append(np.minimum((before + step // 2) // step, 255) if step else np.arange(256))
    return _look_up(pixels, tables)


def _histograms(pixels: np.ndarray) -> list[np.ndarray]:
    return [cv2.calcHist([pixels], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]


def _look_up(pixels: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    return cv2.LUT(pixels, np.stack(tables, axis=-1)[:, None].astype(np.uint8))


def _enhancement(level: float) -> float:
    return 0.1 + 1.8 * abs(level)


def brightness(pixels: np.ndarray, level: float) -> np.ndarray:
    """Scales all values."""
    return cv2.convertScaleAbs(pixels, alpha=_enhancement(level))


def sharpness(pixels: np.ndarray, level: float) -> np.ndarray:
    """Scales the distance from the smoothed image: each pixel's mean with its neighbours, itself counted fivefold."""
    factor = _enhancement(level)
    own = factor + (1 - factor) * 4 / 13
    return cv2.addWeighted(pixels, own, cv2.blur(pixels, (3, 3)), 1 - own, 0)


def shear_x(pixels: np.ndarray, level: float) -> np.ndarray:
    """Moves each row by 0.3 `level` times its distance from the top."""
    return _warped(pixels, [[1, 0.3 * level, 0], [0, 1, 0]])


def shear_y(pixels: np.ndarray, level: float) -> np.ndarray:
    """Moves each column by 0.3 `level` times its distance from the left."""
    return _warped(pixels, [[1, 0, 0], [0.3 * level, 1, 0]])


def translate_x(pixels: np.ndarray, level: float) -> np.ndarray:
    """Moves the image by 10 `level` pixels to the left."""
    return _warped(pixels, [[1, 0, 10 * level], [0, 1, 0]])


def translate_y(pixels: np.ndarray, level: float) -> np.ndarray:
    """Moves the image by 10 `level` pixels upwards."""
    return _warped(pixels, [[1, 0, 0], [0, 1, 10 * level]])


def rotate(pixels: np.ndarray, level: float) -> np.ndarray:
    """Turns the image by 30 `level` degrees about its centre, anticlockwise."""
    height, width = pixels.shape[:2]
    cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    x, y = width / 2, height / 2
    return _warped(pixels, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _warped(pixels: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """`matrix` tells where (x, y, 1) of the result comes from, pixels being squares of side 1."""
    moved = np.array(matrix, dtype=np.float64)
    moved[:, 2] += moved[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV has the centre of the first pixel at (0, 0)
    height, width = pixels.shape[:2]
    four = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)  # warping four channels takes half as long as warping three
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    four = cv2.warpAffine(four, moved, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=_GREY)
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)


OPERATIONS: tuple[Callable[[np.ndarray, float], np.ndarray], ...] = (  # of an image and a level from -1 to 1
    *(_identity, autocontrast, equalize, brightness, sharpness),
    *(shear_x, shear_y, translate_x, translate_y, rotate),
)
