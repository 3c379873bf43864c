"""Compressed bytes to RGB pixels, as little work as the crop allows.

A plain JPEG is decoded by simplejpeg at the smallest DCT scale that still covers the crop, of those that are a power
of two: libjpeg-turbo decodes the others without SIMD, 5/8 takes longer than the whole. What is left to shrink, mostly
less than twofold, is OpenCV's, whose INTER_AREA would take longer than the decoding (docs/measurements.md).
All else (PNG, WebP, CMYK and slightly damaged JPEG) goes through Pillow; transparency is laid over white.

Images are seen as viewers show them: turned as their EXIF orientation says. Boxes are chosen in the turned image, and
only the resized crop is turned. img2dataset writes pixels as they were stored, mostly without the tag; XMP's
orientation is not looked at, as in browsers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.errors import SampleError
from data_pipelines.samples.augment import Box
from data_pipelines.shards.header import Header, bare, has_more_scans, read_header

MAX_PIXELS = 64_000_000  # to decode: an 8000 x 8000 photograph; a decompression bomb declares far more
MAX_BUFFERED_PIXELS = 2 * MAX_PIXELS  # of a JPEG in several scans, whose coefficients take six bytes per pixel
MAX_SCANS = 100  # of a JPEG; progressive ones have about ten, and each decodes the whole image once more

Image.MAX_IMAGE_PIXELS = None  # Pillow would print warnings above its own bound, before ours is looked at

ChooseBox = Callable[[int, int], Box]  # (height, width) -> crop


class _Turn(NamedTuple):
    """From stored pixels to what is seen: first exchange rows and columns, then mirror each axis that is to be."""

    transpose: bool
    down: bool
    across: bool

    def stored(self, box: Box, height: int, width: int) -> Box:
        """Where the pixels of a box of the seen image, of `height` x `width`, are stored."""
        top = height - box.top - box.height if self.down else box.top
        left = width - box.left - box.width if self.across else box.left
        if self.transpose:
            return Box(left, top, box.width, box.height)
        return Box(top, left, box.height, box.width)

    def seen(self, crop: np.ndarray, flip: bool) -> np.ndarray:
        """A stored crop as it is seen, and mirrored if `flip`."""
        if self.transpose:
            crop = cv2.transpose(crop)
        across = self.across != flip
        if self.down or across:
            return cv2.flip(crop, 0 if not across else -1 if self.down else 1)
        return np.ascontiguousarray(crop)


_UPRIGHT = _Turn(False, False, False)
_TURNS = {  # by EXIF's orientation: JEITA CP-3451, section 4.6.4
    1: _UPRIGHT,
    2: _Turn(False, False, True),
    3: _Turn(False, True, True),
    4: _Turn(False, True, False),
    5: _Turn(True, False, False),
    6: _Turn(True, False, True),
    7: _Turn(True, True, True),
    8: _Turn(True, True, False),
}


def decode_crop(data: bytes, choose_box: ChooseBox, size: int, *, exif_orientation: bool = True) -> np.ndarray:
    """Decodes an image, crops it and resizes the crop.

    Args:
        data: JPEG, PNG or WebP.
        choose_box: Given the full height and width, as seen, before any pixel is decoded.
        size: Side of the result in pixels.
        exif_orientation: Whether to turn the image as its EXIF orientation says.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        SampleError: Not an image, damaged, or too large.
    """
    header = read_header(data)
    turn = _TURNS[header.orientation] if exif_orientation else _UPRIGHT
    height, width = (header.width, header.height) if turn.transpose else (header.height, header.width)
    seen = choose_box(height, width)
    crop = _crop(data, header, turn.stored(seen, height, width), size)
    if crop.shape[:2] != (size, size):
        crop = _resized(crop, size)
    return turn.seen(crop, seen.flip)


def check_image(data: bytes) -> None:
    """Raises SampleError where `decode_crop` would; decodes the whole image."""
    header = read_header(data)
    _ = _crop(data, header, Box(0, 0, header.height, header.width), 1)


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    shrink = max(crop.shape[:2]) / size
    if shrink <= 2:  # up to there linear, and up to 1.4 cubic, is nearer to Lanczos than Pillow's bilinear
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_CUBIC if shrink <= 1.4 else cv2.INTER_LINEAR)
    import torch  # takes a second, and packing never resizes

    pixels = torch.tensor(crop).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _crop(data: bytes, header: Header, box: Box, size: int) -> np.ndarray:
    """The pixels of a box of the stored image, at the scale that suits a result of `size`."""
    eighths = _eighths(header, box, size)
    if header.is_buffered:
        _check_scans(data, header)
    if header.format == "JPEG" and header.components in (1, 3):
        height, width = (-(-side * eighths // 8) for side in (header.height, header.width))
        for end in (b"", b"\xff\xd9"):  # which may be missing where no pixel is
            try:
                pixels = simplejpeg.decode_jpeg(data + end, min_height=height, min_width=width)
            except ValueError:
                continue  # Pillow forgives what can be forgiven, such as stray bytes between segments
            left, top, right, bottom = _corners(box, header, *pixels.shape[:2])
            return pixels[top:bottom, left:right]
    try:
        with Image.open(io.BytesIO(bare(data, header)), formats=(header.format,)) as image:
            image.draft(None, (max(1, header.width * eighths // 8), max(1, header.height * eighths // 8)))
            left, top, right, bottom = _corners(box, header, image.height, image.width)
            if header.format == "PNG" and "transparency" in image.info:
                bits = data[24]  # of a colour
                if image.mode == "RGB" and bits == 16:
                    return _keyed_rgb16(data)[top:bottom, left:right]
                if image.mode == "L":  # Pillow scales the pixels to 8 bits, and not the shade that is transparent
                    image.info["transparency"] = image.info["transparency"] % 2**bits * 255 // (2**bits - 1)
            return np.asarray(_rgb(image.crop((left, top, right, bottom))))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any class on damaged bytes
        why = header.oddity or ("it is cut short" if "truncated" in str(error).lower() else type(error).__name__)
        raise SampleError(f"image cannot be decoded: {why}") from error


def _eighths(header: Header, box: Box, size: int) -> int:
    """The DCT scale: the smallest that covers the box, or where that makes too many pixels, the next that does not."""
    eighths, pixels, shorter = 8, header.height * header.width, min(box.height, box.width)
    if header.format == "JPEG":
        eighths = next((k for k in (1, 2, 4) if shorter * k >= 8 * size), 8)
        while eighths > 1 and pixels * eighths**2 > 64 * MAX_PIXELS:
            eighths //= 2
    if pixels * eighths**2 > 64 * MAX_PIXELS:
        scaled = ", even at an eighth of its size" if eighths == 1 else ""
        raise SampleError(f"image of {header.width} x {header.height} pixels is larger than {MAX_PIXELS:,}{scaled}")
    return eighths


def _check_scans(data: bytes, header: Header) -> None:
    if header.height * header.width > MAX_BUFFERED_PIXELS:
        raise SampleError(
            f"image of {header.width} x {header.height} pixels in several scans is larger than {MAX_BUFFERED_PIXELS:,}"
        )
    if has_more_scans(data, MAX_SCANS):
        raise SampleError(f"image of more than {MAX_SCANS} scans")


def _corners(box: Box, header: Header, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a box of the stored image in one decoded to `height` x `width`."""
    down, across = height / header.height, width / header.width
    top, left = round(box.top * down), round(box.left * across)
    bottom = max(top + 1, round((box.top + box.height) * down))
    right = max(left + 1, round((box.left + box.width) * across))
    return left, top, right, bottom


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip, not scale
        deep = np.asarray(image)
        grey = np.where(deep == image.info.get("transparency", -1), 255, deep >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _keyed_rgb16(data: bytes) -> np.ndarray:
    """A PNG of 16 bits per colour, one of which is transparent: Pillow would drop lower bytes before it compares."""
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert deep is not None
    return np.where(deep[..., 3:] == 0, 255, deep[..., 2::-1] // 256).astype(np.uint8)
