"""Text as every part of the data reads it, and JSON as every part writes it."""

from __future__ import annotations

import base64
import codecs
import json
import math
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TextIO
from uuid import UUID


def decode_text(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    return raw.decode(_encoding(raw))


def open_text(path: Path) -> TextIO:
    """The same of a file, line by line, with line ends as they are."""
    with path.open("rb") as file:
        head = file.read(2)
    return path.open(encoding=_encoding(head), newline="")


def to_json(content: object, indent: int | None = None) -> str:
    """JSON as RFC 8259 has it, which knows no NaN and no infinity: they become null.

    Bytes become base64, dates and decimals what `str` says of them, half a character its escape.
    """
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, default=_plain, indent=indent)
    except ValueError:
        text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, default=_plain, indent=indent)
    return text.encode(errors="backslashreplace").decode()


def number_of(value: object) -> float:
    """What a number or a numeric string says; NaN for all else, infinity and true included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):  # OverflowError: an integer of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def cut(text: str, most: int = 200) -> str:
    """A text as messages show it: its beginning, where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 shard" or "2,000 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time | timedelta | Decimal | UUID):  # as parquet has them; a datetime is a date
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
