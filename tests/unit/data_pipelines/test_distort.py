"""Distortions do to an image what Pillow's do, at the rates and by the ranges that they claim, keyed by position."""

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from corpus import Corpus
from PIL import Image, ImageEnhance, ImageOps

from data_pipelines.config import AugmentConfig
from data_pipelines.samples import distort as module
from data_pipelines.samples.augment import Augmentation
from data_pipelines.samples.distort import OPERATIONS, blur, distort, jitter, rand_augment

IDENTITY, AUTOCONTRAST, EQUALIZE, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = OPERATIONS
GREY = (128, 128, 128)


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth noise between 40 and 200."""
    small = np.random.default_rng(seed).integers(40, 200, (height // 6, width // 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).clip(40, 200)


def affine(pixels: np.ndarray, *matrix: float) -> np.ndarray:
    image = Image.fromarray(pixels)
    size, method = (pixels.shape[1], pixels.shape[0]), Image.Transform.AFFINE
    return np.asarray(image.transform(size, method, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)).astype(int)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("level", [-1, 0.3, 1])
def test_an_operation_gives_an_image_of_the_same_kind_and_leaves_its_input_alone(
    operation: Callable[[np.ndarray, float], np.ndarray], level: float
):
    pixels = picture()
    before = pixels.copy()
    out = operation(pixels, level)
    assert (out.shape, out.dtype) == (pixels.shape, np.uint8)
    assert out.flags.c_contiguous
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("seed", range(3))
def test_autocontrast_and_equalize_are_pillows(seed: int):
    pixels = picture(seed=seed)
    pixels[..., 2] = 77  # a channel without contrast stays as it is
    image = Image.fromarray(pixels)
    assert np.array_equal(AUTOCONTRAST(pixels, 1), np.asarray(ImageOps.autocontrast(image)))
    assert np.array_equal(EQUALIZE(pixels, 1), np.asarray(ImageOps.equalize(image)))


@pytest.mark.parametrize("magnitude", range(11))
def test_brightness_and_sharpness_are_pillows_by_albefs_factors(magnitude: int):
    pixels = picture()
    image, factor = Image.fromarray(pixels), 0.1 + 0.18 * magnitude
    for level in (magnitude / 10, -magnitude / 10):
        expected = np.asarray(ImageEnhance.Brightness(image).enhance(factor)).astype(int)
        assert np.abs(BRIGHTNESS(pixels, level) - expected).max() <= 1
        noise = np.random.default_rng(0).integers(80, 160, pixels.shape, dtype=np.uint8)
        expected = np.asarray(ImageEnhance.Sharpness(Image.fromarray(noise)).enhance(factor)).astype(int)
        assert np.abs(SHARPNESS(noise, level) - expected)[1:-1, 1:-1].max() <= 2  # Pillow leaves the edge out
    if magnitude == 5:
        assert np.array_equal(BRIGHTNESS(pixels, 0.5), pixels)
        assert np.abs(SHARPNESS(pixels, 0.5).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("level", [-1, -0.7, 0.2, 1])
def test_moves_are_pillows_by_albefs_distances_over_grey(level: float):
    pixels = picture()
    moves = [
        (SHEAR_X, (1, 0.3 * level, 0, 0, 1, 0)),
        (SHEAR_Y, (1, 0, 0, 0.3 * level, 1, 0)),
        (TRANSLATE_X, (1, 0, 10 * level, 0, 1, 0)),
        (TRANSLATE_Y, (1, 0, 0, 0, 1, 10 * level)),
    ]
    for move, matrix in moves:
        moved, expected = move(pixels, level), affine(pixels, *matrix)
        assert np.abs(moved - expected).mean() < 1.5, move
        outside = np.all(expected == 128, axis=-1).astype(np.uint8)
        outside = cv2.erode(outside, np.ones((3, 3))).astype(bool)  # the seam itself is mixed
        assert outside.any()
        assert np.all(moved[outside] == 128), move
    turned = Image.fromarray(pixels).rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)
    assert np.abs(ROTATE(pixels, level) - np.asarray(turned).astype(int)).mean() < 1.5


@pytest.mark.parametrize("move", [SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, IDENTITY])
def test_a_move_of_magnitude_0_changes_nothing(move: Callable[[np.ndarray, float], np.ndarray]):
    assert np.array_equal(move(picture(), 0.0), picture())


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
def test_each_part_of_the_jitter_is_pillows(factor: float):
    pixels = picture()
    image = Image.fromarray(pixels)
    parts = {
        (factor, 1.0, 1.0): ImageEnhance.Brightness,
        (1.0, factor, 1.0): ImageEnhance.Contrast,
        (1.0, 1.0, factor): ImageEnhance.Color,
    }
    for factors, enhance in parts.items():
        expected = np.asarray(enhance(image).enhance(factor)).astype(int)
        assert np.abs(jitter(pixels, *factors) - expected).max() <= 2, enhance


def test_the_jitter_is_its_three_parts_one_after_the_other_but_for_clipping():
    pixels = picture()
    image = Image.fromarray(pixels)
    for enhance, factor in ((ImageEnhance.Brightness, 0.8), (ImageEnhance.Contrast, 0.7), (ImageEnhance.Color, 1.2)):
        image = enhance(image).enhance(factor)
    assert np.abs(jitter(pixels, 0.8, 0.7, 1.2) - np.asarray(image).astype(int)).max() <= 3


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_a_gaussian_of_its_width(sigma: float):
    point = np.zeros((41, 41, 3), dtype=np.uint8)
    point[20, 20] = 255
    weights = np.array([math.exp(-((i - 20) ** 2) / (2 * sigma**2)) for i in range(41)])
    expected = 255 * np.outer(weights, weights) / weights.sum() ** 2
    assert np.abs(blur(point, sigma) - expected[..., None]).max() < 1.5


def applied(monkeypatch: pytest.MonkeyPatch, magnitude: int, positions: int) -> list[tuple[int, float]]:
    """(number, level) of every operation that RandAugment of 2 applies."""
    seen: list[tuple[int, float]] = []

    def spy(number: int) -> Callable[[np.ndarray, float], np.ndarray]:
        return lambda pixels, level: seen.append((number, level)) or pixels

    with monkeypatch.context() as patch:
        patch.setattr(module, "OPERATIONS", tuple(spy(number) for number in range(10)))
        for position in range(positions):
            rand_augment(picture(), 2, magnitude, seed=0, position=position)
    return seen


def test_rand_augment_applies_each_of_ten_operations_equally_often_half_of_the_time_and_either_way(
    monkeypatch: pytest.MonkeyPatch,
):
    seen = applied(monkeypatch, 7, 5000)
    assert len(seen) == pytest.approx(2 * 5000 / 2, rel=0.03)
    assert np.bincount([number for number, _ in seen]) == pytest.approx(np.full(10, 500), rel=0.15)
    assert {level for _, level in seen} == {0.7, -0.7}
    assert np.mean([level > 0 for _, level in seen]) == pytest.approx(0.5, abs=0.02)


CONFIG = AugmentConfig(rand_augment=(2, 7), color_jitter=0.4, gaussian_blur=0.5)


def test_a_distortion_is_keyed_by_seed_and_position():
    def draws(seed: int) -> list[bytes]:
        return [distort(picture(), CONFIG, seed=seed, position=position).tobytes() for position in range(50)]

    first = draws(1)
    assert first == draws(1)
    assert len(set(first)) == 50
    assert not set(first) & set(draws(2))


def test_jitter_and_blur_have_their_ranges(monkeypatch: pytest.MonkeyPatch):
    factors: list[tuple[float, ...]] = []
    widths: list[float] = []
    monkeypatch.setattr(module, "jitter", lambda pixels, *given: factors.append(given) or pixels)
    monkeypatch.setattr(module, "blur", lambda pixels, sigma: widths.append(sigma) or pixels)
    config = AugmentConfig(color_jitter=0.4, gaussian_blur=0.5)
    for position in range(2000):
        distort(np.zeros((448, 448, 3), dtype=np.uint8), config, seed=0, position=position)
    for column in np.array(factors).T:
        assert (column.min(), column.mean(), column.max()) == pytest.approx((0.6, 1.0, 1.4), abs=0.02)
    assert len(factors) == 2000
    assert len(widths) / 2000 == pytest.approx(0.5, abs=0.04)
    assert (min(widths), max(widths)) == pytest.approx((0.2, 4.0), abs=0.05), "twice as wide at 448 pixels as at 224"


def test_switching_one_distortion_on_leaves_the_draws_of_the_others_alone(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, ...]] = []
    monkeypatch.setattr(module, "jitter", lambda pixels, *given: seen.append(given) or pixels)
    for config in (CONFIG, AugmentConfig(color_jitter=0.4)):
        distort(picture(), config, seed=0, position=3)
    assert seen[0] == seen[1]


def test_without_any_distortion_an_image_is_handed_on_as_it_is():
    pixels = picture()
    assert Augmentation((0.5, 1.0), True, AugmentConfig(), seed=0).distorted(pixels, position=1) is pixels


def test_the_trainer_sees_distorted_images_and_evaluation_does_not(corpus: Corpus):
    augment = {"rand_augment": [4, 9], "color_jitter": 0.4}
    data = [corpus.training(**changes) for changes in ({}, {"augment": augment}, {"augment": augment})]
    plain, distorted, again = (next(each.batches(each.initial_state())) for each in data)
    changed = (plain.tensors["images"] != distorted.tensors["images"]).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.9
    assert torch.equal(distorted.tensors["images"], again.tensors["images"])
    assert torch.equal(plain.tensors["masked_text"], distorted.tensors["masked_text"])
    assert torch.equal(plain.tensors["image_ids"], distorted.tensors["image_ids"])
    heldout = [next(corpus.heldout(**changes).batches(20)) for changes in ({}, {"augment": augment})]
    assert torch.equal(heldout[0].tensors["images"], heldout[1].tensors["images"])
