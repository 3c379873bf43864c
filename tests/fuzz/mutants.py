"""Small shards of real images, and every way to spoil them that we know.

Each sample carries its tag in its image, its captions, its json and its key, so that a mixed pair is seen at once.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

BLOCK = 512
# Of the samples of a shard; the last is for a sample that a mutation adds.
TAGS = tuple(f"tag{number}{zlib.crc32(bytes([number])):08x}" for number in range(5))

FIRED = "a pickle was loaded"  # the folder that a pickle would make

Entry = tuple[str, bytes]
Form = Literal[0, 1, 2]  # ustar, GNU, pax, as tarfile numbers them
FORMATS: tuple[Form, ...] = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@dataclass(frozen=True)
class Shard:
    """A good tar."""

    entries: tuple[Entry, ...]
    form: Form
    data: bytes
    headers: tuple[int, ...]  # offset of each member's own header
    payloads: tuple[tuple[int, int], ...]  # offset and size of each member's bytes

    @classmethod
    def of(cls, entries: list[Entry], form: Form) -> Shard:
        data = pack(entries, form)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            infos = archive.getmembers()
        payloads = tuple((info.offset_data, info.size) for info in infos)
        return cls(tuple(entries), form, data, tuple(start - BLOCK for start, _ in payloads), payloads)


@dataclass(frozen=True)
class Mutant:
    """What became of a shard."""

    kind: str
    shard: int  # which of `shards()`
    data: bytes
    may_mix: bool  # headers or whole payloads were exchanged: what the tar itself says may be a wrong pair
    twice: bool  # spoilt by a second kind as well


def make_mutant(number: int, seed: int) -> Mutant:
    """The mutant of a number: a pure function of its arguments."""
    rng = Random(f"{seed}/{number}")
    which, kind = rng.randrange(len(shards())), rng.choice(list(KINDS))
    data, kinds = KINDS[kind](rng, shards()[which]), {kind}
    if len(data) > 2 * BLOCK and rng.random() < 0.15:
        again = rng.choice(_ON_BYTES)
        headers = tuple(range(0, len(data) - BLOCK, BLOCK))
        data = KINDS[again](rng, Shard((), tarfile.GNU_FORMAT, data, headers, ((0, len(data)),)))
        kinds.add(again)
    return Mutant(kind, which, data, not kinds.isdisjoint(_MIXING), len(kinds) > 1)


@cache
def shards() -> tuple[Shard, ...]:
    """The good ones: each of the tar formats, with keys in folders, long keys, and images and captions of all kinds."""
    folders = ("", "a.b/c/", "long/" + "d" * 70 + "/", "é" * 40 + "/")
    made: list[Shard] = []
    for number, form in enumerate((*FORMATS, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        entries: list[Entry] = []
        for place, tag in enumerate(TAGS[:-1]):
            key = folders[(number + place) % 4] + tag + ("x" * 60 if (number + place) % 3 == 0 else "")
            entries += _sample(key, tag, number * 4 + place)
        made.append(Shard.of(entries, form))
    return tuple(made)


def pack(entries: list[Entry], form: Form = tarfile.GNU_FORMAT) -> bytes:
    """A tar without the padding to 10 KiB, so that mutations hit what matters."""
    out = io.BytesIO()
    for name, content in entries:
        out.write(_member(name, content, form))
    return out.getvalue() + bytes(2 * BLOCK)


def _member(name: str, content: bytes, form: Form, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, errors="surrogateescape") + content + bytes(-len(content) % BLOCK)


def _sample(key: str, tag: str, variety: int) -> list[Entry]:
    name, image = _IMAGES[variety % len(_IMAGES)]
    entries = [(f"{key}.{name}", image(tag))]
    text = f"a red square above a {tag}".encode()
    style = variety % 5
    if style != 2:
        entries.append((f"{key}.txt", b"" if style == 3 else text))
    if style == 1:
        entries.append((f"{key}.json", json.dumps({"uid": tag * 3, "score": 0.5, "language": "en"}).encode()))
    elif style == 2:
        entries.append((f"{key}.json", json.dumps({"caption": text.decode(), "pad": "p" * 600}).encode()))
    elif style == 3:
        several = [f"the {word} {tag}" for word in ("large", "green", "photograph of")]
        entries.append((f"{key}.json", json.dumps({"captions": several}).encode()))
    return entries


# Images ------------------------------------------------------------------------------------------------------


def _picture(tag: str, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(zlib.crc32(tag.encode())).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def _jpeg(tag: str, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    _picture(tag, mode).save(out, "JPEG", comment=tag.encode(), **options)
    return out.getvalue()


def _png(tag: str, mode: str = "RGB", **options: object) -> bytes:
    image = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100) if mode == "I;16" else None
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", tag)
    out = io.BytesIO()
    (image or _picture(tag, mode)).save(out, "PNG", pnginfo=info, **options)
    return out.getvalue()


def _webp(tag: str, **options: object) -> bytes:
    out = io.BytesIO()
    _picture(tag).save(out, "WEBP", xmp=tag.encode(), **options)
    return out.getvalue()


_IMAGES: tuple[tuple[str, Callable[[str], bytes]], ...] = (
    ("jpg", _jpeg),
    ("png", _png),
    ("webp", _webp),
    ("JPEG", lambda tag: _jpeg(tag, progressive=True)),
    ("jpg", lambda tag: _jpeg(tag, "CMYK")),
    ("png", lambda tag: _png(tag, "P")),
    ("jpg", lambda tag: _jpeg(tag, "L")),
    ("png", lambda tag: _png(tag, "RGBA")),
    ("webp", lambda tag: _webp(tag, save_all=True, append_images=[_picture(tag + "2")])),
    ("png", lambda tag: _png(tag, "I;16")),
    ("png", lambda tag: _png(tag, "1")),
    ("webp", lambda tag: _webp(tag, lossless=True)),
    ("png", lambda tag: _png(tag, save_all=True, append_images=[_picture(tag + "2")])),
)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int, *extra: bytes, rows: int = 0) -> bytes:
    """A PNG whose header declares a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((3 * width + 1) * rows), 9)
    parts = (_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_size(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A small JPEG whose frame header declares a size."""
    data = bytearray(_jpeg("", progressive=progressive))
    frame = next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _webp_of_size(width: int, height: int) -> bytes:
    data = bytearray(_webp("no tag"))
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@cache
def hostile_images() -> tuple[bytes, ...]:
    """Decompression bombs, images of kinds that nobody asked for, and what is no image."""
    bomb = zlib.compress(bytes(50_000_000), 9)
    profile = _chunk(b"iCCP", b"x\0\0" + bomb)
    gif, tiff, bmp = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for file, kind in ((gif, "GIF"), (tiff, "TIFF"), (bmp, "BMP")):
        _picture("x").save(file, kind)
    return (
        png_of_size(50_000, 50_000, rows=20),
        png_of_size(2**31 - 1, 2**31 - 1),
        png_of_size(24, 20, profile, rows=20),
        png_of_size(24, 20, _chunk(b"zTXt", b"x\0\0" + bomb), rows=20),
        png_of_size(24, 20, *[_chunk(b"zTXt", b"x\0\0" + bomb[:1000])] * 70, rows=20),
        png_of_size(24, 20, rows=5),
        png_of_size(0, 20),
        png_of_size(24, 20, _chunk(b"IDAT", bomb), rows=0),
        jpeg_of_size(65_500, 65_500),
        jpeg_of_size(65_500, 65_500, progressive=True),
        jpeg_of_size(13_000, 13_000),
        png_of_size(13_000, 13_000, rows=1),
        jpeg_of_size(0, 24),
        jpeg_of_size(24, 2_000),
        _webp_of_size(16_383, 16_383),
        _webp_of_size(1 << 24, 1 << 24),
        gif.getvalue(),
        tiff.getvalue(),
        bmp.getvalue(),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8",
        b"\xff\xd8\xff" + b"\xff" * 4000,
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
    )


# Captions and json -------------------------------------------------------------------------------------------

HOSTILE_CAPTIONS = (
    *(b"", b" \n\t ", b"\0", b"\0\0red", b"red\0square", b"\xef\xbb\xbfred circle", b"\xef\xbb\xbf"),
    *(b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"),
    *(b"a" * 65_536, b"a" * 65_537, b"a " * 40_000, "é".encode() * 32_768, b"\xe2\x80\x8b" * 9, b"\x01\x02\x7f"),
    *("\u202egnp.exe".encode(), b"\xcc\x81" * 500, b"\n" * 70_000, b"line\nline\r\nline\x1b[2J", b"<pad> [MASK] <s>"),
)

HOSTILE_JSON = (
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"caption": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    *(b'{"score": ' + b"9" * 400 + b', "caption": "red"}', b'{"score": ' + b"9" * 10_000 + b', "caption": "red"}'),
    *(b'{"score": NaN, "caption": "red"}', b'{"score": -Infinity, "caption": "red"}', b'{"score": 1e999}'),
    *(b'{"score": true, "uid": "-1", "caption": "red"}', b'{"uid": "-fffffffffffffff-1", "caption": "red"}'),
    *(b'{"uid": "__________", "caption": "red"}', b'{"uid": "\\ud800", "caption": "red"}'),
    *(b'{"caption": "red", "caption": "green"}', b'{"captions": ["red"], "captions": []}'),
    *(b'{"caption": "\\ud800", "language": "\\udfff"}', b'{"captions": ["\\ud83d\\ude00", "\\udc00 red"]}'),
    *(b'{"caption": "red", "language": "\\ud800"}', b'{"caption": "red", "language": ["\\ud800"]}'),
    *(b'{"\\ud800": 1, "caption": "a"}', b'{"caption": "\xed\xa0\x80"}', b'{"caption": "\xff"}'),
    *('{"caption": "red"}'.encode("utf-16"), '{"captions": ["red"]}'.encode("utf-32"), b'\xef\xbb\xbf{"caption": "r"}'),
    *(b"[]", b"null", b"0", b'"caption"', b"", b" ", b"{", b"{}", b'{"caption": null}', b'{"caption": ["red"]}'),
    *(b'{"captions": "red"}', b'{"captions": []}', b'{"captions": [null, 1, {}]}', b'{"captions": ["", " ", "red"]}'),
    *(b'{"captions": {"0": "red"}}', b'{"captions": ["red", "' + b"x" * 70_000 + b'"]}', b'{"caption": "\\u0000"}'),
    *(b'{"captions": null, "caption": "red"}', b'{"captions": [[["red"]]], "caption": "green"}', b'{"a": 1}garbage'),
    b'{"captions": [' + b'"red square", ' * 20_000 + b'"red"]}',
)

# Bytes ---------------------------------------------------------------------------------------------------------


def _splice(data: bytes, start: int, stop: int, new: bytes) -> bytes:
    return data[:start] + new + data[stop:]


def _flip_bits(rng: Random, shard: Shard) -> bytes:
    data = bytearray(shard.data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_in_header(rng: Random, shard: Shard) -> bytes:
    data = bytearray(shard.data)
    for _ in range(rng.randint(1, 2)):
        data[rng.choice(shard.headers) + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite(rng: Random, shard: Shard) -> bytes:
    at, size = rng.randrange(len(shard.data)), rng.choice((1, 2, 16, 64, 600))
    return _splice(shard.data, at, at + size, rng.randbytes(size))[: len(shard.data)]


def _zero_blocks(rng: Random, shard: Shard) -> bytes:
    blocks = len(shard.data) // BLOCK
    at, count = rng.randrange(blocks), rng.choice((1, 1, 2, 3, 8))
    return _splice(shard.data, at * BLOCK, (at + count) * BLOCK, bytes(count * BLOCK))[: len(shard.data)]


def _swap_blocks(rng: Random, shard: Shard) -> bytes:
    one, other = sorted(BLOCK * block for block in rng.sample(range(len(shard.data) // BLOCK), 2))
    size = rng.choice((BLOCK, BLOCK, 2 * BLOCK)) if other - one >= 2 * BLOCK <= len(shard.data) - other else BLOCK
    data = bytearray(shard.data)
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(data)


def _truncate(rng: Random, shard: Shard) -> bytes:
    at = rng.randrange(len(shard.data))
    return shard.data[: at // BLOCK * BLOCK if rng.random() < 0.3 else at]


def _range(rng: Random, shard: Shard) -> tuple[int, int]:
    unit = rng.choice((1, BLOCK))
    at = rng.randrange(len(shard.data) // unit) * unit
    return at, at + rng.randint(1, 8 if unit == BLOCK else 700) * unit


def _delete(rng: Random, shard: Shard) -> bytes:
    return _splice(shard.data, *_range(rng, shard), b"")


def _duplicate(rng: Random, shard: Shard) -> bytes:
    start, stop = _range(rng, shard)
    to = rng.choice((stop, rng.randrange(len(shard.data) // BLOCK) * BLOCK))
    return _splice(shard.data, to, to, shard.data[start:stop])


def _insert(rng: Random, shard: Shard) -> bytes:
    at = rng.choice((*shard.headers, rng.randrange(len(shard.data))))
    new = rng.randbytes(rng.choice((1, 511, 512, 700))) if rng.random() < 0.7 else bytes(512)
    return _splice(shard.data, at, at, new)


def _damage_payload(rng: Random, shard: Shard) -> bytes:
    data = bytearray(shard.data)
    start, size = rng.choice([payload for payload in shard.payloads if payload[1]])
    at = start + rng.randrange(size)
    stop = min(start + size, at + rng.choice((1, 1, 8, 64, size)))
    how = rng.randrange(3)
    data[at:stop] = bytes(stop - at) if how == 0 else rng.randbytes(stop - at)
    if how == 2:
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


# Headers -------------------------------------------------------------------------------------------------------


def sealed(header: bytes) -> bytes:
    """A header whose checksum is made to fit."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def _forge(rng: Random, shard: Shard, at: int, stop: int, new: bytes) -> bytes:
    start = rng.choice(shard.headers)
    header = _splice(shard.data[start : start + BLOCK], at, stop, new.ljust(stop - at, b"\0")[: stop - at])
    return _splice(shard.data, start, start + BLOCK, sealed(header))


def _forge_size(rng: Random, shard: Shard) -> bytes:
    number = rng.choice((0, 1, 511, 512, 513, 1024, 2048, len(shard.data), 2**30, 2**33 - 1, rng.randrange(9000)))
    field = rng.choice(
        (
            b"%011o\0" % number,
            b"%011o " % number,
            b"%12o" % number,
            b"\x80" + number.to_bytes(11, "big"),
            b"\x80" + rng.randbytes(11),
            b"\xff" * 4 + rng.randbytes(8),  # base 256 and negative
            *(b"-0000000001\0", b"+0000000777\0", b"0o777\0", b"1_0_0\0", b"99999999999\0", b"\0" * 12, b" " * 12),
        )
    )
    return _forge(rng, shard, 124, 136, field)


def _forge_field(rng: Random, shard: Shard) -> bytes:
    at, stop = rng.choice(((0, 100), (0, 1), (100, 108), (156, 157), (157, 257), (257, 265), (345, 500), (500, 512)))
    new = rng.randbytes(stop - at)
    if (at, stop) == (156, 157):
        new = bytes([rng.choice(b"01234567gxXLKSVMDNAZ\0 ")])
    elif stop == 100 and at == 0 and rng.random() < 0.7:
        new = rng.choice(_NAMES).encode(errors="surrogateescape")
    return _forge(rng, shard, at, stop, new)


def _forge_checksum(rng: Random, shard: Shard) -> bytes:
    start = rng.choice(shard.headers) + 148
    field = rng.choice((rng.randbytes(8), b"\0" * 8, b" " * 8, b"%06o\0 " % rng.randrange(2**17), b"\x80" * 8))
    return _splice(shard.data, start, start + 8, field)


def _long_header(rng: Random, kind: bytes, payload: bytes, size: int | None = None) -> bytes:
    form = rng.choice(FORMATS)
    data = _member("././@LongLink", payload, form, kind)
    if size is None:
        return data
    return sealed(_splice(data[:BLOCK], 124, 136, b"%011o\0" % size)) + data[BLOCK:]


def _giant_header(rng: Random, shard: Shard) -> bytes:
    kind = rng.choice(b"LKxXg").to_bytes()
    size = rng.choice((1 << 20, (1 << 20) + 1, 2**33 - 1, 5_000, 300))
    payload = b"n" * min(size, rng.choice((10, 700, (1 << 20) + 1)))
    if kind in b"xXg" and rng.random() < 0.7:
        declared = min(size, (1 << 20) + 1)
        payload = b"%d path=%b\n" % (declared, b"n" * (declared - 7 - len(str(declared))))
        size = rng.choice((size, len(payload)))
    times = rng.choice((1, 1, 2, 300)) if len(payload) < 1000 else 1
    at = rng.choice((*shard.headers, len(shard.data) - 2 * BLOCK))
    return _splice(shard.data, at, at, _long_header(rng, kind, payload, size) * times)


_PAX_RECORDS = (
    *(b"13 size=-001\n", b"11 size=0\n", b"10 size=0\n", b"30 size=999999999999999999999\n", b"13 size=1e10\n"),
    *(b"0 path=a\n", b"-9 path=a\n", b"99999999999999999999 a=b\n", b"9 path=a", b"path=a\n", b"8 path=\n", b"5 =a\n"),
    *(b"12 path=a\0b\n", b"19 GNU.sparse.a=b\n", b"23 GNU.sparse.major=1\n", b"\0\0\0", b"", b"9 \xff\xfe=\xff\n"),
    *(b"19 path=../../x.jpg"[:18] + b"\n", b"14 charset=x\n ", b"10 path=a\n10 path=b\n", b"22 linkpath=/etc/passwd"),
)


def _pax(rng: Random, shard: Shard) -> bytes:
    payload = b"".join(rng.choices(_PAX_RECORDS, k=rng.choice((1, 1, 2, 40))))
    at = rng.choice((*shard.headers, len(shard.data) - 2 * BLOCK))
    return _splice(shard.data, at, at, _long_header(rng, rng.choice((b"x", b"X", b"g")), payload))


def _odd_member(rng: Random, shard: Shard) -> bytes:
    kind = rng.choice(b"1234567SVMDNAZ").to_bytes()
    name = rng.choice([name for name, _ in shard.entries] + ["link", "dir/", "dev.jpg"])
    content = rng.choice((b"", b"x" * 20, b"y" * 2000))
    fields = {"linkname": rng.choice(("/etc/passwd", "../../x", shard.entries[0][0][:90])), "devmajor": 1, "mode": 0}
    at = rng.choice((*shard.headers, len(shard.data) - 2 * BLOCK))
    return _splice(shard.data, at, at, _member(name, content, tarfile.GNU_FORMAT, kind, **fields))


# Members -------------------------------------------------------------------------------------------------------

_NAMES = (
    *("../../../escape", "/etc/passwd", "./a", "a/../b", "//x", "..", ".", "", " ", "con", "a\\b", "C:\\x", "-rf"),
    *("n" * 300, "d/" * 200 + "x", "e\u0301" * 60, "\udcff\udcfe", "line\nline", "\x1b[2J\x07", "tab\t", "\u202e"),
    *("__meta__", "__key__", "__x__/y", ".hidden", "a b", "%s%n", "{}", "$(touch x)", "'\"", "\u2028x", "\x85x"),
)


def _repeat(rng: Random, shard: Shard) -> bytes:
    entries = list(shard.entries)
    name, content = rng.choice(entries)
    if rng.random() < 0.3:
        stem, _, extension = name.rpartition(".")
        name = f"{stem}.{rng.choice((extension.upper(), 'jpeg', 'png', 'txt', 'JSON', 'seg.png'))}"
    entries.insert(rng.randrange(len(entries) + 1), (name, content))
    return pack(entries, shard.form)


def _empty_member(rng: Random, shard: Shard) -> bytes:
    entries = list(shard.entries)
    for at in rng.sample(range(len(entries)), rng.randint(1, 3)):
        entries[at] = (entries[at][0], b"")
    return pack(entries, shard.form)


def _path_trick(rng: Random, shard: Shard) -> bytes:
    entries, tag, name = list(shard.entries), TAGS[-1], rng.choice(_NAMES)
    name = "\udcff".join((name, "")) if rng.random() < 0.2 else name
    at = rng.choice([0, len(entries), *(i for i in range(1, len(entries)) if _key(entries, i) != _key(entries, i - 1))])
    entries[at:at] = _sample(name + rng.choice(("", tag, "/")), tag, rng.randrange(13))
    return pack(entries, rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))


def _key(entries: list[Entry], at: int) -> str:
    return entries[at][0].rpartition(".")[0]


class _Fires:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (FIRED,)


def pickled() -> bytes:
    """A pickle that leaves a mark where it is loaded."""
    return pickle.dumps(_Fires(), protocol=4)


def _pickles(rng: Random, shard: Shard) -> bytes:
    content = pickled()
    entries = list(shard.entries)
    for _ in range(rng.randint(1, 4)):
        extension = rng.choice(("pkl", "pyd", "pickle", "pt", "pth", "npy", "npz", "json", "txt", "jpg", "cls"))
        at = rng.randrange(len(entries))
        stem = entries[at][0].rpartition(".")[0]
        entries.insert(at, (f"{stem}.{extension}", content))
    return pack(entries, shard.form)


def _replace(rng: Random, shard: Shard, extensions: tuple[str, ...], content: Callable[[bytes], bytes]) -> bytes:
    entries = list(shard.entries)
    places = [i for i, (name, _) in enumerate(entries) if name.lower().endswith(extensions)]
    for at in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 6)))):
        entries[at] = (entries[at][0], content(entries[at][1]))
    return pack(entries, shard.form)


_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def _hostile_image(rng: Random, shard: Shard) -> bytes:
    image = rng.choice(hostile_images())
    return _replace(rng, shard, _PICTURES, lambda _: image)


def _cut_image(rng: Random, shard: Shard) -> bytes:
    return _replace(rng, shard, _PICTURES, lambda image: image[: rng.randrange(len(image))])


def _corrupt_image(rng: Random, shard: Shard) -> bytes:
    def corrupt(image: bytes) -> bytes:
        at = rng.randrange(len(image))
        return _splice(image, at, at + rng.choice((0, 1, 4)), rng.randbytes(rng.choice((1, 1, 4))))

    return _replace(rng, shard, _PICTURES, corrupt)


def _hostile_caption(rng: Random, shard: Shard) -> bytes:
    return _replace(rng, shard, (".txt",), lambda _: rng.choice(HOSTILE_CAPTIONS))


def _hostile_json(rng: Random, shard: Shard) -> bytes:
    return _replace(rng, shard, (".json",), lambda _: rng.choice(HOSTILE_JSON))


# Archives ------------------------------------------------------------------------------------------------------


def _concatenate(rng: Random, shard: Shard) -> bytes:
    other = rng.choice(shards()).data
    between = rng.choice((b"", bytes(BLOCK), bytes(20 * BLOCK), bytes(300), rng.randbytes(300)))
    end = rng.choice((b"", b"", rng.randbytes(700), bytes(5 * BLOCK), other))
    return shard.data[: len(shard.data) - rng.choice((0, 0, BLOCK, 2 * BLOCK))] + between + other + end


def _scatter(rng: Random, shard: Shard) -> bytes:
    entries = list(shard.entries)
    for _ in range(rng.choice((1, 1, 3, 20))):
        entries.insert(rng.randrange(len(entries)), entries.pop(rng.randrange(len(entries))))
    return pack(entries, shard.form)


def _no_tar(rng: Random, shard: Shard) -> bytes:
    return rng.choice(
        (
            b"",
            b"\0",
            bytes(BLOCK),
            bytes(10 * BLOCK),
            gzip.compress(shard.data, 1, mtime=0),
            b"<html>404 Not Found</html>" * 50,
            rng.randbytes(rng.randrange(4000)),
            shard.data[BLOCK:],
            b"PK\3\4" + shard.data,
        )
    )


KINDS: dict[str, Callable[[Random, Shard], bytes]] = {
    "flip bits": _flip_bits,
    "flip bits of headers": _flip_in_header,
    "overwrite bytes": _overwrite,
    "zero blocks": _zero_blocks,
    "swap blocks": _swap_blocks,
    "truncate": _truncate,
    "delete a range": _delete,
    "repeat a range": _duplicate,
    "insert bytes": _insert,
    "damage a payload": _damage_payload,
    "forge a size": _forge_size,
    "forge a field": _forge_field,
    "forge a checksum": _forge_checksum,
    "giant headers": _giant_header,
    "pax records": _pax,
    "odd members": _odd_member,
    "repeat a member": _repeat,
    "empty members": _empty_member,
    "scatter members": _scatter,
    "path tricks": _path_trick,
    "pickles": _pickles,
    "hostile images": _hostile_image,
    "cut images": _cut_image,
    "corrupt images": _corrupt_image,
    "hostile captions": _hostile_caption,
    "hostile json": _hostile_json,
    "concatenate": _concatenate,
    "no tar": _no_tar,
}
_ON_BYTES = tuple(KINDS)[:8]  # that ask for no entries
_MIXING = ("swap blocks", "delete a range", "repeat a range", "forge a field", "forge a size", "pax records")
