"""The script that a caption is written in."""

import bisect
from collections import Counter

# First characters of runs of one script, and the scripts; what lies between the blocks counts as "other".
_BLOCKS = (
    *((0x41, "Latin"), (0x250, "Latin"), (0x2B0, "other"), (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "Armenian")),
    *((0x590, "Hebrew"), (0x600, "Arabic"), (0x700, "other"), (0x750, "Arabic"), (0x780, "other"), (0x8A0, "Arabic")),
    *((0x900, "Devanagari"), (0x980, "Bengali"), (0xA00, "Gurmukhi"), (0xA80, "Gujarati"), (0xB00, "other")),
    *((0xB80, "Tamil"), (0xC00, "Telugu"), (0xC80, "Kannada"), (0xD00, "Malayalam"), (0xD80, "Sinhala")),
    *((0xE00, "Thai"), (0xE80, "Lao"), (0xF00, "other"), (0x1000, "Myanmar"), (0x10A0, "Georgian")),
    *((0x1100, "Hangul"), (0x1200, "Ethiopic"), (0x13A0, "other"), (0x1780, "Khmer"), (0x1800, "other")),
    *((0x1C80, "Cyrillic"), (0x1C90, "Georgian"), (0x1CC0, "other"), (0x1E00, "Latin"), (0x1F00, "Greek")),
    *((0x2000, "other"), (0x2C60, "Latin"), (0x2C80, "other"), (0x2DE0, "Cyrillic"), (0x2E00, "other")),
    *((0x3005, "Han"), (0x3008, "other"), (0x3040, "Kana"), (0x3100, "other"), (0x3130, "Hangul"), (0x3190, "other")),
    *((0x31F0, "Kana"), (0x3200, "other"), (0x3400, "Han"), (0x4DC0, "other"), (0x4E00, "Han"), (0xA000, "other")),
    *((0xA640, "Cyrillic"), (0xA6A0, "other"), (0xA720, "Latin"), (0xA800, "other"), (0xAC00, "Hangul")),
    *((0xD7B0, "other"), (0xF900, "Han"), (0xFB00, "Latin"), (0xFB13, "other"), (0xFB1D, "Hebrew")),
    *((0xFB50, "Arabic"), (0xFE00, "other"), (0xFE70, "Arabic"), (0xFF00, "Latin"), (0xFF66, "Kana")),
    *((0xFFA0, "Hangul"), (0xFFE0, "other"), (0x20000, "Han"), (0x40000, "other")),
)
_STARTS = tuple(start for start, _ in _BLOCKS)


def script_of(caption: str) -> str:
    """The script of most of a caption's letters: "Latin", "Han", "Cyrillic" and so on, "none" where it has none.

    Japanese mixes two: a caption with any kana counts as Kana.
    """
    if caption.isascii():
        return "Latin" if any(map(str.isalpha, caption)) else "none"
    letters = Counter(_BLOCKS[bisect.bisect(_STARTS, ord(c)) - 1][1] for c in caption if c.isalpha())
    if "Kana" in letters:
        return "Kana"
    return max(sorted(letters), key=letters.__getitem__, default="none")
