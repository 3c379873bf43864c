"""A demonstration corpus that a small model can learn in minutes: two coloured shapes and how they stand.

Every caption can be checked against its picture, so retrieval, matching and masked words mean something, and the
held-out scenes combine colours and shapes that never stood together in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.randomness import Purpose, permutation, uniform

DRAWING = 1  # raise it with every change after which the same seed gives other pictures or captions
SIZES = ("small", "large")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "cross", "diamond", "square", "star", "triangle")
RELATIONS = {  # how the first of two objects stands to the second, and in words
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = ("", "", "", "a picture of ", "there is ")
SHORT_SHARE = 0.1  # of the training captions: shapes alone, the form of the zero-shot prompts
PROMPTS = ("a {} and a {}", "a picture of a {} and a {}")

Look = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Scene:
    """The subject stands in `relation` to the object."""

    subject: tuple[str, str, str]  # size, colour, shape
    object: tuple[str, str, str]
    relation: str


@lru_cache
def look_pairs(*, heldout: bool) -> list[tuple[Look, Look]]:
    """The unordered pairs of looks, shapes different, of one of the two splits; about a tenth are held out."""
    looks = list(product(COLOURS, SHAPES))
    pairs = [(a, b) for a, b in combinations(looks, 2) if a[1] != b[1]]
    return [pair for pair in pairs if (hashlib.sha256(repr(pair).encode()).digest()[0] % 10 == 0) == heldout]


def draw_scene(heldout: bool, seed: int, index: int) -> tuple[Scene, list[float]]:
    """The scene of a sample, and further uniform numbers for its picture and caption."""
    pairs = look_pairs(heldout=heldout)
    draws = uniform(seed, Purpose.SCENES, index, int(heldout), size=32).tolist()
    variants = list(product(SIZES, SIZES, RELATIONS))
    if heldout:  # all different while there are enough: retrieval must have one right answer
        scenes = _heldout_scenes(seed, len(pairs) * len(variants))
        pair_index, variant_index = divmod(int(scenes[index % len(scenes)]), len(variants))
    else:
        pair_index, variant_index = int(draws[0] * len(pairs)), int(draws[1] * len(variants))
    first, second = pairs[pair_index]
    size_1, size_2, relation = variants[variant_index]
    scene = Scene((size_1, *first), (size_2, *second), relation)
    if draws[2] < 0.5:
        scene = Scene(scene.object, scene.subject, INVERSE[relation])
    return scene, draws[3:]


def caption_of(scene: Scene, draws: Sequence[float], *, short: bool) -> str:
    """One of many true sentences about the scene."""
    if short:
        prompt = _pick(PROMPTS, draws[0])
        shapes = (scene.subject[2], scene.object[2])
        return prompt.format(*(shapes if draws[1] < 0.5 else shapes[::-1]))
    relation = _pick(RELATIONS[scene.relation], draws[0])
    prefix = _pick(PREFIXES, draws[1])
    verb = "is " if not prefix and draws[2] < 0.5 else ""
    return f"{prefix}a {' '.join(scene.subject)} {verb}{relation} a {' '.join(scene.object)}"


def picture_of(scene: Scene, draws: Sequence[float], side: int) -> Image.Image:
    """The scene on a greyish ground, jittered."""
    scale = 2  # drawn larger and reduced, for smooth edges
    ground = tuple(int(105 + 45 * draw) for draw in draws[:3])
    image = Image.new("RGB", (side * scale, side * scale), ground)
    pen = ImageDraw.Draw(image)
    near, far = 0.26 + 0.04 * (draws[3] - 0.5), 0.74 + 0.04 * (draws[4] - 0.5)
    across_1, across_2 = 0.5 + 0.1 * (draws[5] - 0.5), 0.5 + 0.1 * (draws[6] - 0.5)
    at = {
        "left of": ((near, across_1), (far, across_2)),
        "right of": ((far, across_1), (near, across_2)),
        "above": ((across_1, near), (across_2, far)),
        "below": ((across_1, far), (across_2, near)),
    }[scene.relation]
    for (size, colour, shape), (x, y), jitter in zip((scene.subject, scene.object), at, draws[7:9], strict=True):
        radius = (0.14 if size == "small" else 0.22) * (0.92 + 0.16 * jitter)
        tint = tuple(
            min(255, max(0, value + int(24 * (draws[9 + i] - 0.5)))) for i, value in enumerate(COLOURS[colour])
        )
        _draw_shape(pen, shape, x * side * scale, y * side * scale, radius * side * scale, tint)
    return image.reduce(scale)


def zero_shot_prompts() -> dict[str, object]:
    """The metadata field to predict, and the sentences that stand for each of its values."""
    classes = {
        f"{a} and {b}": [prompt.format(*pair) for prompt in PROMPTS for pair in ((a, b), (b, a))]
        for a, b in combinations(SHAPES, 2)
    }
    return {"field": "shapes", "classes": classes}


@lru_cache(maxsize=1)
def _heldout_scenes(seed: int, size: int) -> np.ndarray:
    return permutation(seed, Purpose.SCENES, 0, 2, size=size)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "cross":
        arm = radius * 0.36
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        # Corners as (number, turn, ratio of the inner radius).
        count, turn, inner = {
            "diamond": (4, 0.0, 1.0),
            "square": (4, math.pi / 4, 1.0),
            "star": (10, 0.0, 0.42),
            "triangle": (3, 0.0, 1.0),
        }[shape]
        points: list[tuple[float, float]] = []
        for corner in range(count):
            angle = turn + 2 * math.pi * corner / count
            reach = radius * 1.15 * (inner if corner % 2 else 1.0)
            points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
        pen.polygon(points, fill=colour)


def _pick(choices: Sequence[str], draw: float) -> str:
    return choices[int(draw * len(choices))]
