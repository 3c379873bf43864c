"""The demo of emoji names what its pictures show, in two languages, and draws with whatever emoji font there is."""

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji as names_package
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics
from PIL import Image

from data_pipelines import emoji_pictures
from data_pipelines.demo import Demo, Scenes
from data_pipelines.emoji_pictures import GROUNDS, EmojiPictures, find_font
from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest
from data_pipelines.reader import ShardReader
from data_pipelines.tokenizer import Tokenizer

SHOWN = "⚽⭐🍎🍕🎈🐱🐶🐸👑💎🚗🦋"
Box = tuple[int, int, int, int]


def rectangle(*box: int):
    pen = TTGlyphPen(None)
    left, bottom, right, top = box or (0, 0, 0, 0)
    if box:
        pen.moveTo((left, bottom))
        for corner in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(corner)
        pen.closePath()
    return pen.glyph()


def make_font(path: Path, kind: str, characters: str = SHOWN, *, ppem: int = 109, missing: Box | None = None) -> Path:
    """Builds a font that draws each character as a rectangle of its own height.

    Args:
        path: To write.
        kind: "outlines", "COLR 0" (left half red, right half blue), "COLR 1", or "CBDT" (bitmaps alone).
        characters: It has glyphs for.
        ppem: The one size of the bitmaps.
        missing: Drawn for every other character.
    """
    names = [f"u{ord(character):X}" for character in characters]
    glyphs = {".notdef": rectangle(*missing or ())}
    glyphs |= {
        name: rectangle(0, 0, 1000, 300 + 50 * i) if kind in ("outlines", "COLR 0") else rectangle()
        for i, name in enumerate(names)
    }
    glyphs |= {"left": rectangle(0, 0, 500, 1000), "right": rectangle(500, 0, 1000, 1000)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(character): name for character, name in zip(characters, names, strict=True)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 500 if name == "right" else 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    if kind.startswith("COLR"):
        paint = {"Format": 10, "Glyph": "left", "Paint": {"Format": 2, "PaletteIndex": 0, "Alpha": 1.0}}
        builder.setupCOLR({name: [("left", 0), ("right", 1)] if kind == "COLR 0" else paint for name in names})
        builder.setupCPAL([[(1, 0, 0, 1), (0, 0, 1, 1)]])
    if kind == "CBDT":
        add_bitmaps(builder.font, names, ppem)
    builder.save(path)
    return path


def add_bitmaps(font: Any, names: list[str], ppem: int) -> None:
    del font["glyf"], font["loca"]
    locations, bitmaps = newTable("CBLC"), newTable("CBDT")
    locations.version = bitmaps.version = 3.0
    strike = E_B_L_C_.Strike()
    size = strike.bitmapSizeTable
    size.hori, size.vert = E_B_L_C_.SbitLineMetrics(), E_B_L_C_.SbitLineMetrics()
    fields = "ascender descender widthMax caretSlopeNumerator caretSlopeDenominator caretOffset minOriginSB"
    for line in (size.hori, size.vert):
        for field in f"{fields} minAdvanceSB maxBeforeBL minAfterBL pad1 pad2".split():
            setattr(line, field, {"ascender": 100, "widthMax": ppem}.get(field, 0))
    size.colorRef, size.startGlyphIndex, size.endGlyphIndex = 0, 1, len(names)
    size.ppemX = size.ppemY = ppem
    size.bitDepth, size.flags = 32, 1
    table = E_B_L_C_.eblc_index_sub_table_1(b"", font)
    table.indexFormat, table.imageFormat, table.names = 1, 17, names
    table.firstGlyphIndex, table.lastGlyphIndex = 1, len(names)
    strike.indexSubTables = [table]
    locations.strikes = [strike]
    data: dict[str, Any] = {}
    for i, name in enumerate(names):
        glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", font)
        glyph.metrics = metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
        metrics.height, metrics.width, metrics.BearingX, metrics.BearingY, metrics.Advance = 60 + i, 100, 0, 90, 110
        png = io.BytesIO()
        Image.new("RGBA", (100, 60 + i), (0, 200, 0, 255)).save(png, "PNG")
        glyph.imageData = png.getvalue()
        data[name] = glyph
    bitmaps.strikeData = [data]
    font["CBLC"], font["CBDT"] = locations, bitmaps


@pytest.fixture(scope="module")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_font(tmp_path_factory.mktemp("font") / "emoji.ttf", "COLR 0", missing=(100, 0, 300, 700))


@pytest.fixture(scope="module")
def pictures(font: Path) -> EmojiPictures:
    return EmojiPictures(font)


def shown(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(np.asarray(picture).astype(int) - colour).max(axis=-1) < 30).sum())


@pytest.mark.parametrize(
    ("kind", "ppem", "colour"),
    [
        ("outlines", 0, (40, 40, 40)),
        ("COLR 0", 0, (255, 0, 0)),
        ("CBDT", 109, (0, 200, 0)),
        ("CBDT", 160, (0, 200, 0)),
    ],
)
def test_fonts_of_outlines_layers_and_bitmaps_are_drawn(
    kind: str, ppem: int, colour: tuple[int, int, int], tmp_path: Path
):
    pictures = EmojiPictures(make_font(tmp_path / "f.ttf", kind, ppem=ppem))
    assert "".join(emoji.character for emoji in pictures.emoji) == SHOWN
    picture, _, _ = pictures.sample(0, heldout=False, seed=0, size=64)
    assert picture.size == (64, 64)
    assert shown(picture, colour) > 100


@pytest.mark.parametrize("missing", [None, (100, 0, 300, 700)])
def test_what_the_font_has_no_glyph_for_is_left_out(missing: Box | None, tmp_path: Path):
    pictures = EmojiPictures(make_font(tmp_path / "f.ttf", "outlines", "A⭐🍎", missing=missing))
    assert [emoji.names["en"] for emoji in pictures.emoji] == ["star", "red apple"]


def test_of_more_emoji_than_asked_for_some_are_taken_from_all_over(pictures: EmojiPictures):
    assert [emoji.character for emoji in replace(pictures, count=4).emoji] == [*SHOWN[::3]]
    assert len(replace(pictures, count=5).emoji) == 5


@pytest.mark.parametrize(("kind", "characters"), [("COLR 1", SHOWN), ("outlines", "AB")])
def test_a_font_without_emoji_that_can_be_drawn_is_an_error(kind: str, characters: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"f\.ttf has no emoji that Pillow can draw .*: name another with --font"):
        EmojiPictures(make_font(tmp_path / "f.ttf", kind, characters)).prompts()


def test_a_font_that_cannot_be_used_is_named(tmp_path: Path):
    fonts = [make_font(tmp_path / "odd.ttf", "CBDT", ppem=50), tmp_path / "text.ttf"]
    fonts[1].write_text("nothing")
    for path in fonts:
        with pytest.raises(DataError, match=rf"{path.name} cannot be used by Pillow: name another with --font"):
            EmojiPictures(path).prompts()
    with pytest.raises(DataError, match=r"none\.ttf cannot be read \(No such file or directory\): name another with"):
        EmojiPictures(tmp_path / "none.ttf").record()


def test_an_installed_font_is_found_one_of_colours_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji_pictures, "FONT_FOLDERS", (tmp_path / "none", tmp_path))
    with pytest.raises(
        DataError, match=r"No emoji font in \S+none, .*Debian and Ubuntu: fonts-noto-color-emoji, .*--font"
    ):
        find_font()
    (tmp_path / "noto").mkdir()
    for name in ("AnEmoji.ttf", "NotoColorEmoji.ttf", "NotoColorEmoji.txt", "Sans.ttf"):
        (tmp_path / "noto" / name).touch()
    assert find_font().name == "NotoColorEmoji.ttf"
    (tmp_path / "noto" / "NotoColorEmoji.ttf").unlink()
    assert find_font().name == "AnEmoji.ttf"


def test_without_the_package_of_names_the_error_tells_how_to_get_it(font: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(DataError, match="need the emoji package: `pip install emoji`"):
        EmojiPictures(font).record()


def test_names_are_plain_words_and_belong_to_one_emoji_each(pictures: EmojiPictures):
    everything = emoji_pictures._all_emoji()
    assert len(everything) > 1300
    for language in ("en", "zh"):
        names = [emoji.names[language] for emoji in everything]
        assert len(set(names)) == len(names)
        assert not any(set(name) & set(":_") for name in names)
    by_character = {emoji.character: emoji.names for emoji in everything}
    assert by_character["🍎"] == {"en": "red apple", "zh": "红苹果"}
    assert "\U0001f3fb" not in by_character  # a skin tone, which stands for nothing by itself


def test_an_emoji_that_is_not_named_in_every_language_is_left_out(monkeypatch: pytest.MonkeyPatch):
    emoji_pictures._all_emoji.cache_clear()
    names_package.config.load_language("zh")
    monkeypatch.delitem(names_package.EMOJI_DATA["🍎"], "zh")
    monkeypatch.setattr(names_package.config, "load_language", lambda language: None)
    assert "🍎" not in {emoji.character for emoji in emoji_pictures._all_emoji()}
    emoji_pictures._all_emoji.cache_clear()


def test_captions_name_the_emoji_and_the_ground_in_the_language_they_say(pictures: EmojiPictures):
    languages: Counter[str] = Counter()
    names = {emoji.names["en"]: emoji.names for emoji in pictures.emoji}
    for index in range(240):
        picture, caption, metadata = pictures.sample(index, heldout=True, seed=0, size=32)
        language, ground = str(metadata["language"]), str(metadata["ground"])
        assert names[str(metadata["name"])][language] in caption
        words, colour = GROUNDS[ground]
        assert words[language] in caption
        assert shown(picture, colour) > 200
        languages[language] += 1
    assert languages == {"en": 120, "zh": 120}
    alone = EmojiPictures(pictures.font, languages=("zh",))
    assert {alone.sample(index, heldout=False, seed=0, size=8)[2]["language"] for index in range(9)} == {"zh"}


def test_training_shows_every_emoji_equally_often_but_never_on_its_held_out_ground(pictures: EmojiPictures):
    pairs: dict[bool, list[tuple[object, object]]] = {}
    for heldout in (False, True):
        rows = [pictures.sample(index, heldout=heldout, seed=3, size=8)[2] for index in range(480)]
        pairs[heldout] = [(row["emoji"], row["ground"]) for row in rows]
        assert set(Counter(character for character, _ in pairs[heldout]).values()) == {40}
    assert not set(pairs[True]) & set(pairs[False])
    assert len(set(pairs[True])) == len(SHOWN)  # one ground each
    assert len(set(pairs[False])) == len(SHOWN) * (len(GROUNDS) - 1)
    assert {character for character, _ in pairs[True][: len(SHOWN)]} == set(SHOWN)  # each once before any comes back


def test_about_a_tenth_of_the_training_captions_are_names_alone(pictures: EmojiPictures):
    def is_short(index: int, *, heldout: bool) -> bool:
        _, caption, metadata = pictures.sample(index, heldout=heldout, seed=0, size=8)
        return GROUNDS[str(metadata["ground"])][0][str(metadata["language"])] not in caption.replace("red apple", "")

    assert 25 < sum(is_short(index, heldout=False) for index in range(480)) < 75
    assert not any(is_short(index, heldout=True) for index in range(100))


def test_an_emoji_lies_wholly_in_its_picture_anywhere_and_of_any_size(tmp_path: Path):
    pictures = EmojiPictures(make_font(tmp_path / "f.ttf", "CBDT", "⭐"))
    centres, areas = [], []
    for index in range(60):
        pixels = np.asarray(pictures.sample(index, heldout=False, seed=0, size=64)[0]).astype(int)
        green = (pixels[..., 1] > 150) & (pixels[..., 0] < 60) & (pixels[..., 2] < 60)
        places = np.argwhere(green)
        centres.append(places.mean(axis=0))
        areas.append(green.sum() / (0.6 * 64**2))  # the bitmap is 100 wide and 60 high
    sides = np.sqrt(areas)
    assert 0.45 < sides.min() < 0.55
    assert 0.7 < sides.max() < 0.77
    assert (np.ptp(centres, axis=0) > 10).all()


@pytest.fixture(scope="module")
def made(font: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path]:
    demo = Demo(train=1100, heldout=24, size=32, vocab_size=300, seed=0, kind=EmojiPictures(font))
    folder = tmp_path_factory.mktemp("demo") / "d"
    demo.make(folder, processes=2)
    return demo, folder


def test_a_demo_of_emoji_is_made_again_byte_for_byte_by_any_number_of_processes(
    made: tuple[Demo, Path], tmp_path: Path
):
    demo, folder = made
    demo.make(tmp_path / "again", processes=1)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes(), path
    assert len(list(folder.rglob("*.tar"))) == 3


def test_the_prompts_and_the_tokenizer_of_a_demo_know_every_emoji_in_both_languages(made: tuple[Demo, Path]):
    _, folder = made
    prompts = json.loads((folder / "heldout" / "prompts.json").read_text())
    reader = ShardReader(Manifest.load(folder / "heldout" / "manifest.json"))
    heldout = [reader.read(0, index) for index in range(24)]
    assert {sample.metadata()[prompts["field"]] for sample in heldout} == set(prompts["classes"])
    english, chinese = ["the red apple emoji", "a picture of red apple"], ["红苹果表情", "一张红苹果的图片"]
    assert prompts["classes"]["red apple"] == english + chinese
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    texts = [sample.caption() for sample in heldout] + [text for texts in prompts["classes"].values() for text in texts]
    assert all(tokenizer.unk_id not in tokenizer.pieces(text)[0] for text in texts)


def test_a_demo_of_another_font_or_other_languages_or_more_emoji_is_not_the_same(
    made: tuple[Demo, Path], font: Path, tmp_path: Path
):
    demo, folder = made
    assert demo.is_complete(folder)
    record = json.loads((folder / "demo.json").read_text())
    assert (record["kind"], record["languages"]) == ("emoji", ["en", "zh"])
    other = make_font(tmp_path / "other.ttf", "outlines")
    kinds = (EmojiPictures(other), EmojiPictures(font, ("en",)), EmojiPictures(font, count=5), Scenes())
    for kind in kinds:
        with pytest.raises(DataError, match="not a demo of"):
            replace(demo, kind=kind).is_complete(folder)


def test_a_demo_that_cannot_be_drawn_leaves_nothing_behind(tmp_path: Path):
    kind = EmojiPictures(make_font(tmp_path / "f.ttf", "COLR 1"))
    with pytest.raises(DataError, match="no emoji that Pillow can draw"):
        Demo(24, 12, 8, 300, 0, kind).make(tmp_path / "d", processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["f.ttf"]
