"""One word of a config, read by the type of its key.

YAML 1.1 reads what nobody wrote: to it 0100 is 64, 1:30 is 90, `yes` is true and 2024-01-01 a date. Here a key that
takes a path takes any text, and one that takes a number takes a number, as YAML 1.2's core schema has them.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pretrain.config_text.kinds import is_block, is_list, keys_of, kinds_below

_NULL = ("", "~", "null", "Null", "NULL", "None", "none")  # the last two are Python's and people's
_BOOLEAN = {word: word[0] in "tT" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Unreadable:
    """A text that is no value of its key; it stands where the value would, until the config is checked."""

    def __init__(self, text: str, fix: str = ""):
        self.text, self.fix = text, fix

    def __repr__(self) -> str:
        return repr(self.text if len(self.text) <= 60 else f"{self.text[:60]}...")


def read_word(text: str, kinds: Sequence[Any], *, quoted: bool = False) -> Any:
    """The value of a word at a key that takes `kinds`; in quotes it is never null."""
    literals = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    takes = {kind for kind in kinds if isinstance(kind, type)} | {type(value) for value in literals}
    word = text.strip()
    if word in literals:
        return word
    block = any(is_block(kind) for kind in kinds)
    if NoneType in takes and not quoted and word in _NULL and (word or not block):
        return None  # but a block whose keys are all commented out was not meant to be switched off
    if bool in takes and word in _BOOLEAN:
        return _BOOLEAN[word]
    number = _real(word) if float in takes else _whole(word) if int in takes else None
    if number is not None:
        return number
    if Path in takes:
        return _path(text, nullable=NoneType in takes, quoted=quoted)
    if str in kinds:
        return text
    lists = [kind for kind in kinds if is_list(kind)]
    if lists and "," in word and word[0] not in "([{":
        return [read_word(part, kinds_below(lists, place)) for place, part in enumerate(word.split(","))]
    return Unreadable(text, _right_form(word, takes, kinds))


def _real(word: str) -> float | None:
    if _NO_NUMBER.fullmatch(word):  # which no key takes; it is told as a number that is not finite
        return float(word.replace(".", ""))
    return float(word) if _NUMBER.fullmatch(word) else None


def _whole(word: str) -> int | None:
    if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", word):
        return int(word, 0)
    if re.fullmatch(r"[-+]?[0-9]{1,300}", word):
        return int(word)
    number = _real(word)  # 1e3 is a whole number, 0.5 is none
    return int(number) if number is not None and abs(number) < 2**53 and number.is_integer() else None


def _path(text: str, *, nullable: bool, quoted: bool) -> Path | Unreadable:
    """A path on this machine, `~` and variables replaced by what they stand for."""
    or_null = ", or null" if nullable else ""
    if not text.strip():
        return Unreadable(text, f"it is empty: give a path{or_null}")
    if text in _NULL and text != "~" and not quoted:
        return Unreadable(text, "it cannot be null: give a path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return Unreadable(
            text, "it is a URL: give a path on this machine; only the shards of a manifest may lie elsewhere"
        )
    if "\0" in text or not _is_unicode(text):
        return Unreadable(text, "it has a character that is no text: rename the file or folder")
    for match in re.finditer(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", text, re.ASCII):
        name = match[1] or match[2]
        if not os.environ.get(name):
            return Unreadable(text, f"the variable {name} is not set, or empty: set it, or write the path in full")
    try:
        return Path(os.path.expandvars(Path(text).expanduser() if text.startswith("~") else text))
    except RuntimeError:
        return Unreadable(text, f"there is no user of this name: write ./{text} for a file or folder that is called so")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _right_form(word: str, takes: set[type], kinds: Sequence[Any]) -> str:
    """How to write what was probably meant; empty where the sentence of the check says enough."""
    off = ", or null to switch it off" if NoneType in takes else ""
    if any(is_block(kind) for kind in kinds):
        return f"it is a block of keys{off}: {', '.join(keys_of(kinds))}"
    if any(is_list(kind) for kind in kinds):
        return "write a list, as in [1, 2] or 1,2"
    if not word:
        return f"it is empty: write its value{off}"
    if word in _NULL:
        return "it cannot be null"
    if takes & {int, float}:
        if re.fullmatch(r"[-+]?\d{1,3}([_,' ]\d{3})+", word) or re.fullmatch(r"[-+]?\d+(_\d+)+", word):
            return f"write {re.sub(r'[^-+0-9]', '', word)}, without separators"
        if float in takes and re.fullmatch(r"[-+]?\d+,\d+", word):
            return f"write {word.replace(',', '.')}, with a point"
        return ""
    return "write true or false" if bool in takes else ""
