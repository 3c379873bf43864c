"""What a tar holds, told by a reader that is slow and simple and shares no code with the pipelines.

The rules are those of the documentation: ustar, GNU and pax headers with a checksum that holds; members of one key in
a row are a sample; damage ends the shard, and takes with it the sample that was open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby

BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp")


class UnusableError(Exception):
    """A sample has no captions to learn from."""


@dataclass(frozen=True)
class Found:
    """A run of members with one key."""

    key: str
    start: int
    stop: int
    members: tuple[tuple[str, bytes], ...]  # (lower-case extension, bytes)
    fault: str = ""

    def first(self, *extensions: str) -> bytes | None:
        found = dict(self.members)
        return next((found[extension] for extension in extensions if extension in found), None)


def read_shard(data: bytes) -> tuple[list[Found], bool]:
    """The samples of an archive, those with a fault included, and whether damage follows them."""
    members, end = _members(data, whole=True)
    samples = _group(members)
    if end == "damaged":
        samples = samples[:-1]
    seen: set[str] = set()
    told: list[Found] = []
    for sample in samples:
        fault = "its key came before in the shard" if sample.key in seen else _fault(sample)
        told.append(Found(sample.key, sample.start, sample.stop, sample.members, fault))
        seen.add(sample.key)
    return told, end == "damaged"


def read_range(data: bytes) -> Found | None:
    """The sample that a run of bytes is, or None where it is not exactly one."""
    members, end = _members(data, whole=False)
    samples = _group(members)
    if end == "damaged" or len(samples) != 1 or (samples[0].start, samples[0].stop) != (0, len(data)):
        return None
    sample = samples[0]
    return Found(sample.key, sample.start, sample.stop, sample.members, _fault(sample))


def captions(sample: Found) -> list[str]:
    """What may be said of the image: `captions` of .json, else .txt, else `caption` of .json."""
    raw, text = sample.first("json"), sample.first("txt") or b""
    several = _json(raw).get("captions") if raw and b'"captions"' in raw else None
    texts = [_told(one) for one in several if isinstance(one, str)] if isinstance(several, list) else []
    texts = [one for one in texts if one] or [one for one in [_text(text)] if one]
    if not texts and raw is not None and isinstance(one := _json(raw).get("caption"), str):
        texts = [one for one in [_told(one)] if one]
    if not texts:
        raise UnusableError("empty")
    return texts


def _told(text: str) -> str:
    return _text("".join("?" if "\ud800" <= letter <= "\udfff" else letter for letter in text).encode())


def _text(raw: bytes) -> str:
    if len(raw) > 65_536:
        raise UnusableError("too long")
    try:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = raw.decode("utf-16") if wide else raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8") from None
    if "\0" in text.strip():
        raise UnusableError("null bytes")
    return text.strip()


def _json(raw: bytes) -> dict[str, object]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UnusableError("json")
    return content


def _fault(sample: Found) -> str:
    extensions = [extension for extension, _ in sample.members]
    if len(set(extensions)) < len(extensions):
        return "two members of one kind"
    image, text = sample.first(*IMAGES), sample.first("txt")
    if image is None:
        return "no image"
    if not image:
        return "empty image"
    if text:
        return ""
    try:
        captions(sample)
    except UnusableError as error:
        kinds = {"json": "unreadable json", "empty": "no caption" if text is None else "empty caption"}
        return kinds.get(str(error), "unreadable caption")
    return ""


def _group(members: list[tuple[str, int, int, bytes]]) -> list[Found]:
    named = [(*_split(name), start, stop, content) for name, start, stop, content in members]
    samples: list[Found] = []
    for key, run in groupby((member for member in named if member[0]), lambda member: member[0]):
        parts = list(run)
        samples.append(Found(key, parts[0][2], parts[-1][3], tuple((part[1], part[4]) for part in parts)))
    return samples


def _split(name: str) -> tuple[str, str]:
    *folders, base = name.split("/")
    stem, _, extension = base.partition(".")
    top = name.split("/")[0]
    reserved = len(top) >= 4 and top.startswith("__") and top.endswith("__")  # to webdataset
    if "." not in base or not stem or reserved:
        return "", ""
    return "/".join([*folders, stem]), extension.lower()


def _members(data: bytes, *, whole: bool) -> tuple[list[tuple[str, int, int, bytes]], str]:
    """[(name, start with its own headers, stop, bytes)] and how the reading ended: "whole" or "damaged"."""
    members: list[tuple[str, int, int, bytes]] = []
    at, first, name, pax = 0, None, None, {}
    while True:
        header = data[at : at + BLOCK]
        if not header:
            return members, "damaged" if whole or first is not None else "whole"
        if len(header) == BLOCK and not any(header):
            return members, "whole" if first is None else "damaged"
        size = _size(header)
        if size is None:
            return members, "damaged"
        first = at if first is None else first
        kind, content_at = header[156:157], at + BLOCK
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            content = data[content_at : content_at + size]
            if size > 1 << 20 or len(content) < size:
                return members, "damaged"
            if kind == b"L":
                name = content.split(b"\0")[0]
            elif kind != b"K":
                records = _pax(content)
                if records is None or (kind == b"g" and ("path" in records or "size" in records)):
                    return members, "damaged"
                pax = pax if kind == b"g" else records
            at = content_at + -(-size // BLOCK) * BLOCK
            continue
        if kind == b"S" or [key for key in pax if key.startswith("GNU.sparse.")]:
            return members, "damaged"
        if "size" in pax:
            digits = pax["size"]
            if not digits or len(digits) > 19 or digits.strip("0123456789"):
                return members, "damaged"
            size = int(digits)
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0
        stop = content_at + -(-size // BLOCK) * BLOCK
        if size > 1 << 30 or stop > len(data):
            return members, "damaged"
        if kind in (b"0", b"\0", b"7"):
            called = pax.get("path") or (_utf8(name) if name else _utf8(_ustar_name(header)))
            members.append((called, first, stop, data[content_at : content_at + size]))
        at, first, name, pax = stop, None, None, {}


def _size(header: bytes) -> int | None:
    if len(header) < BLOCK:
        return None
    told = _number(header[148:156])
    if told is None or told % 65_521 != sum(header[:148] + b" " * 8 + header[156:]) % 65_521:
        return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    if field[0] == 128:
        return int(field[1:].hex(), 16)
    digits = field.split(b"\0")[0].strip()
    try:
        number = int(digits, 8) if digits else 0
    except ValueError:
        return None
    return number if number >= 0 else None


def _pax(content: bytes) -> dict[str, str] | None:
    records: dict[str, str] = {}
    while content and content[0]:
        length = content.split(b" ")[0]
        if not length.isdigit() or len(length) > 20 or b" " not in content:
            return None
        record, content = content[: int(length)], content[int(length) :]
        if len(record) < int(length) or not record.endswith(b"\n") or len(record) <= len(length):
            return None
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals:
            return None
        records[_utf8(key)] = _utf8(value)
    return records


def _ustar_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")
