"""Scripts written without spaces between words, by Unicode's line breaking classes (UAX #14) and scripts.

`regex`, which transformers needs anyway, carries both tables and follows each version of Unicode.
"""

import regex

_CLASSES = (
    "SA",  # Thai, Lao, Khmer, Burmese, Tai Le, New Tai Lue, Tai Tham, Tai Viet, Ahom: a dictionary finds the words
    *("ID", "CJ", "EB", "EM"),  # ideographs, kana, bopomofo, Yi, Tangut; and emoji, each a word of its own
    *("AK", "AP", "AS", "VF", "VI"),  # Javanese, Balinese and others, which break after any syllable
)
# Signs of vowels are in no class of their own, and Tibetan is in none of these: a point ends its syllables.
_SCRIPTS = ("Balinese", "Batak", "Brahmi", "Cham", "Dives_Akuru", "Grantha", "Javanese", "Kawi", "Makasar", "Tibetan")
_SET = "".join((*(rf"\p{{Line_Break={name}}}" for name in _CLASSES), *(rf"\p{{Script={name}}}" for name in _SCRIPTS)))
_SET += r"[\p{Line_Break=NS}&&\p{L}]"  # iteration marks, with which no line may begin

UNSPACED = regex.compile(f"[{_SET}]", regex.V1)
"""A character that may be a word, or a part of one, without spaces around it."""

UNSPACED_LETTER = regex.compile(rf"[[{_SET}]&&[\p{{L}}\p{{M}}]]", regex.V1)
SPACED_LETTER = regex.compile(rf"[\p{{L}}--[{_SET}]]", regex.V1)
