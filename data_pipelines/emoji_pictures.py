"""A demonstration corpus in two languages: an emoji on a coloured ground, named in English or Chinese.

Training sees every emoji, but none on the one ground that is kept for its held-out pictures. So what is held out is
drawn of what was learnt, in pairs that were not, and each of its captions fits one picture only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import DataError
from data_pipelines.randomness import Purpose, permutation, uniform

DRAWING = 1  # raise it with every change after which the same seed gives other pictures or captions
FONT_FOLDERS = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path.home() / ".local" / "share" / "fonts",
    Path.home() / ".fonts",
    Path("/System/Library/Fonts"),
)
GROUNDS = {  # its names, and its colour
    "red": ({"en": "red", "zh": "红色"}, (226, 88, 84)),
    "green": ({"en": "green", "zh": "绿色"}, (104, 184, 112)),
    "blue": ({"en": "blue", "zh": "蓝色"}, (86, 136, 226)),
    "purple": ({"en": "purple", "zh": "紫色"}, (152, 104, 196)),
    "pink": ({"en": "pink", "zh": "粉色"}, (246, 176, 204)),
    "brown": ({"en": "brown", "zh": "棕色"}, (150, 108, 76)),
    "grey": ({"en": "grey", "zh": "灰色"}, (150, 150, 150)),
    "white": ({"en": "white", "zh": "白色"}, (246, 246, 246)),
}
SENTENCES = {  # English ones need no article: many names are plurals, verbs or signs
    "en": (
        "the {name} emoji on a {ground} background",
        "{name} on {ground}",
        "a {ground} picture of the {name} emoji",
        "the emoji {name} in front of a {ground} wall",
    ),
    "zh": (
        "{ground}背景上的{name}表情",
        "背景为{ground}的{name}图片",
        "{ground}底色的{name}",
        "贴在{ground}墙上的{name}表情",
    ),
}
NAMES_ALONE = {"en": ("the {name} emoji", "a picture of {name}"), "zh": ("{name}表情", "一张{name}的图片")}
SHORT_SHARE = 0.1  # of the training captions: names alone, the form of the zero-shot prompts
_SIZES = (109, 160, 137, 128)  # Noto's bitmaps exist in the first alone, Apple's in the next two; outlines in any
_INK = (40, 40, 40)  # of a font without colours


@dataclass(frozen=True)
class Emoji:
    """A character and what it shows, by language."""

    character: str
    names: dict[str, str]


@dataclass(frozen=True)
class EmojiPictures:
    """What the demo of emoji shows.

    Args:
        font: A colour font whose glyphs are bitmaps or layers (CBDT, sbix, COLR version 0), or one of outlines.
        languages: Of the captions, in turn: "en", "zh".
        count: How many emoji, at most. After 400 steps of 64 pairs, the tiny model finds about a quarter of 256
            held-out pictures at the first try, but 3 % of 512 where it has to tell all 1,377 emoji.
    """

    font: Path
    languages: tuple[str, ...] = ("en", "zh")
    count: int = 256

    title = "emoji"
    default_heldout = 256  # each emoji once
    default_vocab_size = 1024  # the Chinese names of 256 emoji have 467 characters, all names 1,245

    @cached_property
    def emoji(self) -> list[Emoji]:
        """Some of a single code point that the font has a glyph for, ascending and evenly spread: neighbours are alike.

        Raises:
            DataError: The font or the `emoji` package is missing, or the font has none that can be drawn.
        """
        missing = _glyph(self.font, "\U0010ffff")

        def is_drawn(character: str) -> bool:
            glyph = _glyph(self.font, character)
            return glyph is not None and (missing is None or glyph.tobytes() != missing.tobytes())

        found = [one for one in _all_emoji() if is_drawn(one.character)]
        if not found:
            raise DataError(
                f"Font {self.font} has no emoji that Pillow can draw (COLR version 1 is one that it cannot): "
                f"name another with --font, such as NotoColorEmoji.ttf."
            )
        taken = min(self.count, len(found))
        return [found[number * len(found) // taken] for number in range(taken)]

    def record(self) -> dict[str, object]:
        """What makes a corpus this one and no other, besides the numbers of the demo."""
        return {
            "kind": self.title,
            "languages": list(self.languages),
            "count": self.count,
            "font": _fingerprint(self.font),
            "names": _names_package().__version__,
            "drawing": DRAWING,
        }

    def sample(self, index: int, *, heldout: bool, seed: int, size: int) -> tuple[Image.Image, str, dict[str, object]]:
        """A picture of size x size, its caption and its metadata."""
        block, place = divmod(index, len(self.emoji))
        emoji = self.emoji[_order(seed, heldout, block, len(self.emoji))[place]]
        draws = uniform(seed, Purpose.SCENES, index, int(heldout), 1, size=10).tolist()
        kept = hashlib.sha256(emoji.character.encode()).digest()[0] % len(GROUNDS)
        grounds = list(GROUNDS)
        ground = grounds.pop(kept)
        if not heldout:
            ground = _pick(grounds, draws[0])
        language = self.languages[index % len(self.languages)]
        is_short = not heldout and draws[1] < SHORT_SHARE
        sentence = _pick((NAMES_ALONE if is_short else SENTENCES)[language], draws[2])
        caption = sentence.format(name=emoji.names[language], ground=GROUNDS[ground][0][language])
        metadata: dict[str, object] = {
            "emoji": emoji.character,
            "name": emoji.names["en"],
            "ground": ground,
            "language": language,
        }
        return self._picture(emoji, ground, draws[3:], size), caption, metadata

    def prompts(self) -> dict[str, object]:
        """The metadata field to predict, and the sentences that stand for each of its values."""
        classes = {
            emoji.names["en"]: [
                sentence.format(name=emoji.names[language])
                for language in self.languages
                for sentence in NAMES_ALONE[language]
            ]
            for emoji in self.emoji
        }
        return {"field": "name", "classes": classes}

    def _picture(self, emoji: Emoji, ground: str, draws: Sequence[float], side: int) -> Image.Image:
        tint = tuple(min(255, int(GROUNDS[ground][1][i] + 20 * (draws[i] - 0.5))) for i in range(3))
        image = Image.new("RGB", (side, side), tint)
        glyph = _glyph(self.font, emoji.character)
        assert glyph is not None
        scale = side * (0.5 + 0.25 * draws[3]) / max(glyph.size)
        # By 20 degrees at most: an arrow must keep its direction. Turned first, so that its edges become smooth.
        turned = glyph.rotate(40 * (draws[4] - 0.5), Image.Resampling.BICUBIC, expand=True)
        turned = turned.resize((max(1, int(turned.width * scale)), max(1, int(turned.height * scale))))
        corner = (int(draws[5] * (side - turned.width)), int(draws[6] * (side - turned.height)))
        image.paste(turned, corner, turned)
        return image


def find_font() -> Path:
    """An installed emoji font, by preference one of colours.

    Raises:
        DataError: There is none.
    """
    found = [
        path
        for folder in FONT_FOLDERS
        for path in sorted(folder.rglob("*"))
        if "emoji" in path.name.lower() and path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    if not found:
        raise DataError(
            f"No emoji font in {', '.join(map(str, FONT_FOLDERS))}: install one (Debian and Ubuntu: "
            f"fonts-noto-color-emoji, Fedora: google-noto-color-emoji-fonts), or name one with --font."
        )
    return min(found, key=lambda path: "color" not in path.name.lower())


def _names_package():
    try:
        import emoji  # an optional dependency
    except ImportError:
        raise DataError("The names of emoji need the emoji package: `pip install emoji`.") from None
    return emoji


@lru_cache
def _all_emoji() -> list[Emoji]:
    package = _names_package()
    package.config.load_language("zh")
    found: dict[str, Emoji] = {}
    for text, entry in package.EMOJI_DATA.items():
        character = text.removesuffix("\ufe0f")  # asks for the picture instead of the letter
        is_named = "en" in entry and "zh" in entry  # translations follow new emoji by a year
        if is_named and len(character) == 1 and entry["status"] != package.STATUS["component"]:
            names = {"en": _name(entry["en"], " "), "zh": _name(entry["zh"], "")}
            found[character] = Emoji(character, names)
    return [found[character] for character in sorted(found)]


def _name(alias: str, space: str) -> str:
    return alias.strip(":").replace("_", space)


@lru_cache(maxsize=4)
def _order(seed: int, heldout: bool, block: int, size: int) -> np.ndarray:
    # Each emoji once a block, so that held-out pictures differ for as long as there are enough.
    return permutation(seed, Purpose.SCENES, block, int(heldout), 2, size=size)


@lru_cache
def _load_font(path: Path) -> ImageFont.FreeTypeFont:
    for size in _SIZES:
        with suppress(OSError):  # a font of bitmaps has its own sizes alone
            return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    raise DataError(f"Font {path} cannot be used by Pillow: name another with --font, such as NotoColorEmoji.ttf.")


def _fingerprint(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"Font {path} cannot be read ({error.strerror}): name another with --font.") from None


def _glyph(path: Path, character: str) -> Image.Image | None:
    """The character as RGBA without its margins, none where nothing is drawn."""
    font = _load_font(path)
    margin = font.size // 2  # a glyph may begin before its origin
    image = Image.new("RGBA", (round(2 * font.size), round(2 * font.size)))
    ImageDraw.Draw(image).text((margin, margin), character, font=font, fill=_INK, embedded_color=True)
    box = image.getbbox()
    return image.crop(box) if box else None


def _pick(choices: Sequence[str], draw: float) -> str:
    return choices[int(draw * len(choices))]
