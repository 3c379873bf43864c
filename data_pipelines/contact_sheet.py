"""A grid of thumbnails with their captions, in whatever fonts this machine has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_pipelines.inspection import THUMBNAIL, Picture

_COLUMNS, _LINES = 8, 4
_GAP, _LINE_HEIGHT, _FONT_SIZE = 16, 17, 13  # pixels
_INK, _PAPER, _SHADE = "#1c1c1e", "#ffffff", "#f1f1f4"
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
_FIRST_CHOICE = ("DejaVuSans.", "NotoSans-Regular", "NotoSansCJK-Regular", "SourceHanSans", "wqy-microhei")
_MAX_FONTS = 200


class Typesetter:
    """Finds a font for every character; one that no font has is written as its escape, and remembered.

    Args:
        folders: Where fonts are looked for.
    """

    def __init__(self, folders: Sequence[str] = _FOLDERS):
        self.missing: set[str] = set()
        self._paths = _font_files(folders)
        default = ImageFont.load_default(_FONT_SIZE)
        assert isinstance(default, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        self._fonts: list[_Font] = [_Font(default)]
        self._font_of: dict[str, _Font | None] = {}
        self._widths: dict[str, float] = {}

    def lines(self, text: str, width: int, most: int) -> list[str]:
        """Breaks a text, at spaces where it has some, into at most so many lines of so many pixels."""
        lines, rest = [], self._drawable(text)
        while rest:
            stop = self._fitting(rest, width)
            if stop < len(rest):
                if len(lines) == most - 1:
                    lines.append(rest[: max(1, stop - 1)].rstrip() + "\u2026")
                    return lines
                space = rest.rfind(" ", 0, stop + 1)
                stop = space if space > 0 else stop
            lines.append(rest[:stop].rstrip())
            rest = rest[stop:].lstrip()
        return lines

    def draw(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], line: str) -> None:
        """Draws a line that `lines` made."""
        x, y = place
        for font, run in self._runs(line):
            canvas.text((x, y + _FONT_SIZE), run, fill=_INK, font=font.font, anchor="ls")
            x += font.font.getlength(run)

    def _drawable(self, text: str) -> str:
        def shown(character: str) -> str:
            if character == " " or (character.isprintable() and self._font(character)):
                return character
            self.missing.add(character)
            return character.encode("unicode_escape").decode()

        return "".join(map(shown, " ".join(text.split())))

    def _fitting(self, text: str, width: int) -> int:
        used = 0.0
        for stop, character in enumerate(text):
            used += self._width(character)
            if used > width:
                return max(1, stop)
        return len(text)

    def _width(self, character: str) -> float:
        if character not in self._widths:
            font = self._font(character) or self._fonts[0]
            self._widths[character] = font.font.getlength(character)
        return self._widths[character]

    def _runs(self, line: str) -> Iterator[tuple[_Font, str]]:
        run, current = "", self._fonts[0]
        for character in line:
            font = current if character == " " else self._font(character) or self._fonts[0]
            if font is not current and run:
                yield current, run
                run = ""
            current, run = font, run + character
        if run:
            yield current, run

    def _font(self, character: str) -> _Font | None:
        if character not in self._font_of:
            self._font_of[character] = next((font for font in self._all_fonts() if font.has(character)), None)
        return self._font_of[character]

    def _all_fonts(self) -> Iterator[_Font]:
        # Opened one by one, when the fonts before lack a character.
        yield from tuple(self._fonts)
        while self._paths:
            try:
                font = _Font(ImageFont.truetype(self._paths.pop(0), _FONT_SIZE))
            except OSError:  # of bitmaps in one size, such as colour emoji
                continue
            self._fonts.append(font)
            yield font


class _Font:
    def __init__(self, font: ImageFont.FreeTypeFont):
        self.font = font
        # Without shaping, which would draw a mark that it does not have with a circle below.
        self._plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        self._boxes = {self._drawn("\U0010ffff"), self._drawn("\uffff")}  # what it draws for what it does not have

    def has(self, character: str) -> bool:
        return self._drawn(character) not in self._boxes

    def _drawn(self, character: str) -> bytes:
        image = Image.new("L", (3 * _FONT_SIZE, 2 * _FONT_SIZE))
        ImageDraw.Draw(image).text((_FONT_SIZE, 0), character, fill=255, font=self._plain)
        return image.tobytes()


def contact_sheet(pictures: Sequence[Picture], typesetter: Typesetter | None = None) -> tuple[Image.Image, set[str]]:
    """Draws the pictures with their captions below.

    Returns:
        The sheet, and the characters that no font has: the sheet shows their escapes.
    """
    typesetter = typesetter or Typesetter()
    columns = max(1, min(_COLUMNS, len(pictures)))
    text_height = _LINES * _LINE_HEIGHT
    cell_width, cell_height = THUMBNAIL + _GAP, THUMBNAIL + text_height + _GAP
    num_rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * cell_width + _GAP, num_rows * cell_height + _GAP), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left = _GAP + number % columns * cell_width
        top = _GAP + number // columns * cell_height
        canvas.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), fill=_SHADE)
        width, height = picture.thumbnail.size
        sheet.paste(picture.thumbnail, (left + (THUMBNAIL - width) // 2, top + (THUMBNAIL - height) // 2))
        for line_number, line in enumerate(typesetter.lines(picture.caption, THUMBNAIL, _LINES)):
            typesetter.draw(canvas, (left, top + THUMBNAIL + 4 + line_number * _LINE_HEIGHT), line)
    return sheet, typesetter.missing


def _font_files(folders: Sequence[str]) -> list[str]:
    found = [
        str(path)
        for folder in folders
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]

    def rank(path: str) -> tuple[int, str]:
        name = path.rpartition("/")[2]
        first = (place for place, choice in enumerate(_FIRST_CHOICE) if name.startswith(choice))
        return next(first, len(_FIRST_CHOICE)), path

    return sorted(found, key=rank)[:_MAX_FONTS]
