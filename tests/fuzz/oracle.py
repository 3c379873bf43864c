"""What a tar holds, told by a reader that is slow and simple and shares no code with the pipelines.

The rules are those of the documentation: ustar, GNU and pax headers with a checksum that holds; members of one key in
a row are a sample; damage ends the shard, and takes with it the sample that was open. Tars that were joined are read
one after the other, and bytes that are no tar end the shard, too, but take no sample with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp")
SCATTERED = "its members do not lie together"
OTHER_FILES = (  # as they begin
    *(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"LZIP", b"\x1f\x9d", b"\x5d\0\0"),
    *(b"PK\3\4", b"Rar!", b"7z\xbc\xaf", b"PAR1", b"version https://git-lfs", b"<", b"{"),
)
_PARTS = ("no image", "no caption", SCATTERED)


class UnusableError(Exception):
    """A sample has no captions to learn from."""


@dataclass(frozen=True)
class Found:
    """A run of members with one key."""

    key: str
    start: int
    stop: int
    members: tuple[tuple[str, bytes], ...]  # (lower-case extension, bytes)
    kinds: str = ""  # of all its members: "f" for a file, "l" for a link, "s" for a sparse one
    fault: str = ""

    def first(self, *extensions: str) -> bytes | None:
        found = dict(self.members)
        return next((found[extension] for extension in extensions if extension in found), None)


def read_shard(data: bytes) -> tuple[list[Found], str]:
    """The samples of an archive, those with a fault included, and what follows them that is none."""
    members, end = _members(data, whole=True)
    samples = _group(members)
    if end == "damaged":
        samples = samples[:-1]
    told: list[Found] = []
    for sample in samples:
        fault = _fault(sample) or _caption_fault(sample)
        first = next((one for one in told if one.key == sample.key), None)
        if first is not None:
            theirs = {name for one in told if one.key == sample.key for name, _ in one.members}
            parts = [first.fault in _PARTS, fault in _PARTS]
            fault = (
                SCATTERED
                if any(parts) and theirs.isdisjoint(dict(sample.members))
                else "its key came before in the shard"
            )
            if fault == SCATTERED and parts[0]:
                told[told.index(first)] = replace(first, fault=SCATTERED)
        told.append(replace(sample, fault=fault))
    return told, "" if end == "whole" else end


def read_range(data: bytes) -> Found | None:
    """The sample that a run of bytes is, or None where it is not exactly one."""
    members, end = _members(data, whole=False)
    samples = _group(members)
    if end == "damaged" or len(samples) != 1 or (samples[0].start, samples[0].stop) != (0, len(data)):
        return None
    sample = samples[0]
    return replace(sample, fault=_fault(sample))


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
    if "s" in sample.kinds:
        return "a sparse member"
    image, text = sample.first(*IMAGES), sample.first("txt")
    if image is None:
        return _lack(sample, "no image", IMAGES)
    if not image:
        return "empty image"
    if text:
        return ""
    if text is None and sample.first("json") is None:
        return _lack(sample, "no caption", ("txt", "json"))
    return _caption_fault(sample)


def _caption_fault(sample: Found) -> str:
    text = sample.first("txt")
    try:
        if text and _text(text):
            return ""
    except UnusableError:
        pass
    try:
        captions(sample)
    except UnusableError as error:
        kinds = {"json": "unreadable json", "empty": "no caption" if text is None else "empty caption"}
        return kinds.get(str(error), "unreadable caption")
    return ""


def _lack(sample: Found, fault: str, names: tuple[str, ...]) -> str:
    if [name for name, _ in sample.members if name.rpartition(".")[0] and name.rpartition(".")[2] in names]:
        return "a dot in its key"
    return "a link in the place of a file" if "l" in sample.kinds else fault


def _group(members: list[_Member]) -> list[Found]:
    named = [(*_split(member.name), member) for member in members]
    samples: list[Found] = []
    for (key, _), run in groupby((one for one in named if one[0]), lambda one: (one[0], one[2].archive)):
        parts = list(run)
        files = tuple((extension, member.content) for _, extension, member in parts if member.kind != "l")
        kinds = "".join(member.kind for _, _, member in parts)
        samples.append(Found(key, parts[0][2].start, parts[-1][2].stop, files, kinds))
    return samples


def _split(name: str) -> tuple[str, str]:
    *folders, base = name.split("/")
    stem, _, extension = base.partition(".")
    top = name.split("/")[0]
    reserved = len(top) >= 4 and top.startswith("__") and top.endswith("__")  # to webdataset
    if "." not in base or not stem or reserved:
        return "", ""
    return "/".join([*folders, stem]), extension.lower()


class _Member(NamedTuple):
    name: str
    start: int  # with its own headers
    stop: int
    content: bytes
    kind: str
    archive: int


def _members(data: bytes, *, whole: bool) -> tuple[list[_Member], str]:
    """The members, and how the reading ended: "whole", "damaged", "no tar" or "trailing"."""
    members: list[_Member] = []
    at, first, name, pax, archive, is_after_end = 0, None, None, {}, 0, False
    while True:
        header = data[at : at + BLOCK]
        if not header:
            return members, "damaged" if (whole and not is_after_end) or first is not None else "whole"
        if len(header) == BLOCK and not any(header):
            if first is not None or not whole:
                return members, "whole" if first is None else "damaged"
            at, archive, is_after_end = at + BLOCK, archive + 1, True
            while at < len(data) and not any(data[at : at + BLOCK]):
                at += BLOCK
            continue
        size = _size(header)
        if size is None:
            if at == 0 and header.startswith(OTHER_FILES):
                return members, "no tar"
            return members, "trailing" if is_after_end else "damaged"
        is_after_end = False
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
        sparse = kind == b"S" or bool([key for key in pax if key.startswith("GNU.sparse.")])
        more = kind == b"S" and header[482]
        while more:
            block = data[content_at : content_at + BLOCK]
            content_at, more = content_at + BLOCK, len(block) > 504 and block[504]
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
        if sparse or kind in (b"0", b"\0", b"7", b"1", b"2"):
            called = pax.get("path") or (_utf8(name) if name else _utf8(_ustar_name(header)))
            called = pax.get("GNU.sparse.name") or called
            form = "l" if kind in (b"1", b"2") else "s" if sparse else "f"
            members.append(_Member(called, first, stop, data[content_at : content_at + size], form, archive))
        at, first, name, pax = stop, None, None, {}


def _size(header: bytes) -> int | None:
    if len(header) < BLOCK:
        return None
    told, summed = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in summed)
    if told is None or told % 65_521 not in (sum(summed) % 65_521, signed % 65_521):
        return None
    return _number(header[124:136])


def _number(field: bytes) -> int | None:
    if field[0] == 128:
        return int(field[1:].hex(), 16)
    rest = field.removeprefix(b"\0").lstrip(b" \t\n\v\f\r")
    digits = rest[: len(rest) - len(rest.lstrip(b"01234567"))]
    if rest[len(digits) : len(digits) + 1] not in (b"", *(bytes([end]) for end in b"\0 \t\n\v\f\r")):
        return None
    return int(digits, 8) if digits else 0


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
