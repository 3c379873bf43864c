"""What an image file says of itself before its pixels: format, size, and which way up it is.

Training, filters, statistics and packing all ask here, so that what one of them can read has a size for the others.
Whatever stands in segments and chunks that the pixels do not need, such as broken EXIF, never refuses an image. A
JPEG's header takes some five microseconds.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from data_pipelines.errors import SampleError

Format = Literal["JPEG", "PNG", "WebP"]

FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WebP")  # other decoders are never offered untrusted bytes

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (
    *((b"\xff\xd8", "JPEG"), (_PNG, "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF")),
    *((b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF")),
    *((b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"\0\0\0\x0cjP  ", "JPEG 2000")),
    *((b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\0\0\1\0", "ICO"), (b"8BPS", "PSD")),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIC")
_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml|svg)", re.IGNORECASE)  # error pages, sent instead of an image

# JPEG markers: ITU-T T.81, table B.1. A segment begins with bytes of 255 and one that is not 0.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length: TEM and the restarts between scans' rows
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP1, _SCAN, _END, _START = 0xE1, 0xDA, 0xD9, 0xD8
_CODINGS = {  # of frames that libjpeg may not decode
    0xC3: "lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA), "arithmetic coding"),
    0xCB: "lossless JPEG",
}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))


class Header(NamedTuple):
    """Of an image, as its pixels are stored."""

    format: Format
    height: int
    width: int
    orientation: int  # EXIF's 1 to 8; 1 is upright
    components: int = 3  # of a JPEG, as the two below
    is_buffered: bool = False  # has more than one scan, so that all coefficients are held in memory
    oddity: str = ""  # what a decoder may not support

    @property
    def extension(self) -> str:
        """Of a member that holds such an image."""
        return "jpg" if self.format == "JPEG" else self.format.lower()

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) as viewers show it."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def image_format(data: bytes) -> str:
    """What the first bytes say an image is, such as "JPEG" or "GIF"; empty where they are of no image.

    Training reads those in `FORMATS`.
    """
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if data.startswith(b"RIFF"):
        return "WebP" if data[8:12] == b"WEBP" else ""
    if data.startswith(b"BM"):  # two letters alone may begin a text
        return "BMP" if data[6:10] == bytes(4) and data[15:18] == bytes(3) else ""
    return next((name for start, name in _SIGNATURES if data.startswith(start)), _BRANDS.get(brand, ""))


def read_header(data: bytes) -> Header:
    """Reads what stands before the pixels.

    Raises:
        SampleError: Neither JPEG, PNG nor WebP, or its size is unknown.
    """
    if not data:
        raise SampleError("image cannot be decoded: it is empty")
    found = image_format(data)
    if found not in _READERS:
        wanted = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        if found:
            raise SampleError(f"{found} is not supported: convert it to {wanted}")
        raise SampleError(f"image cannot be decoded: it is {'HTML or XML' if _PAGE.match(data) else f'no {wanted}'}")
    try:
        header = _READERS[found](data)
    except (IndexError, struct.error):
        header = None
    if header is None or not (header.height and header.width):
        raise SampleError("image cannot be decoded: its size is unknown")
    return header


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) as viewers show it; zeros where it is unknown."""
    try:
        return read_header(data).upright_size
    except SampleError:
        return 0, 0


def _jpeg(data: bytes) -> Header | None:
    frame, orientation, components_in_scan = None, 0, 255
    for marker, start, stop in jpeg_segments(data):
        if marker in _FRAMES and frame is None:
            frame = marker, *struct.unpack_from(">BHHB", data, start)
        elif marker == _APP1 and not orientation and data.startswith(b"Exif\0\0", start):
            orientation = _orientation(data[start:stop])
        elif marker == _SCAN:
            components_in_scan = data[start]
            break
    if frame is None:
        return None
    kind, precision, height, width, components = frame
    oddity = f"{precision} bits per colour" if precision != 8 else _CODINGS.get(kind, "")
    is_buffered = kind in _PROGRESSIVE or components_in_scan < components
    return Header("JPEG", height, width, orientation or 1, components, is_buffered, oddity)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of the content of each segment up to the end of the image; as libjpeg finds them.

    Entropy-coded data and stray bytes between segments are passed over; nothing after the end is looked at.
    """
    at, end = 2, len(data) - 3
    while at < end:
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF):  # in entropy-coded data, or after stray bytes
            found = _MARKER.search(data, at)
            if not found or found.end() > end:
                return
            marker, at = data[found.end() - 1], found.end() - 2
        at += 2
        if marker in (_END, _START):
            return
        if marker not in _ALONE:
            stop = at + max(2, data[at] << 8 | data[at + 1])
            yield marker, at + 2, stop
            at = stop


def has_more_scans(data: bytes, limit: int) -> bool:
    """Whether a JPEG has more than `limit` scans, each of which decodes the whole image once more."""
    if data.count(b"\xff\xda") <= limit:  # counts too many, but takes an eighth of the time
        return False
    return sum(marker == _SCAN for marker, _, _ in jpeg_segments(data)) > limit


def bare(data: bytes, header: Header) -> bytes:
    """A JPEG or PNG without what its pixels do not need, in which a decoder could find fault."""
    if header.format == "JPEG":
        parts = [b"\xff\xd8"]
        for marker, start, stop in jpeg_segments(data):
            if marker == _SCAN:
                parts.append(b"\xff\xda" + data[start - 2 :])
                break
            if not (0xE0 < marker <= 0xEF and marker != 0xEE) and marker != 0xFE:  # Adobe's names the colour space
                parts.append(bytes((0xFF, marker)) + data[start - 2 : stop])
        return b"".join(parts)
    if header.format == "PNG":  # chunks with a small first letter may be left out: PNG (third edition), section 5.4
        wanted = [data[at : stop + 4] for kind, at, stop in _png_chunks(data) if kind[0] < 97 or kind == b"tRNS"]
        return b"".join([_PNG, *wanted])
    return data


def _png(data: bytes) -> Header:
    height, width = struct.unpack_from(">II", data, 16)[::-1]
    exif = next((data[at + 8 : stop] for kind, at, stop in _png_chunks(data) if kind == b"eXIf"), b"")
    return Header("PNG", height, width, _orientation(exif))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, stop of the content) of each chunk; a checksum of four bytes follows."""
    at, kind = len(_PNG), b""
    while at + 8 <= len(data) and kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at, at + 8 + size
        at += 12 + size


def _webp(data: bytes) -> Header | None:
    kind, content = data[12:16], data[20:30]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 6))
        return Header("WebP", height, width, 1)
    if kind == b"VP8L":
        bits = int.from_bytes(content[1:5], "little")
        return Header("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 1)
    if kind != b"VP8X" or len(content) < 10:
        return None
    width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (4, 7))
    at, orientation = 12, 1
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            orientation = _orientation(data[at + 8 : at + 8 + size])
            break
        at += 8 + size + size % 2
    return Header("WebP", height, width, orientation)


def _orientation(exif: bytes) -> int:
    """The tag of the first directory, as in TIFF (revision 6, section 2); 1 where there is no valid one."""
    while exif.startswith(b"Exif\0\0"):  # some cameras write it twice
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            at = start + 2 + 12 * entry
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == 0x0112:
                number = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, at + 8)[0]
                return number if 1 <= number <= 8 else 1
    except (struct.error, KeyError):
        pass
    return 1


_READERS: dict[str, Callable[[bytes], Header | None]] = {"JPEG": _jpeg, "PNG": _png, "WebP": _webp}
