"""Compressed bytes to RGB pixels, as little work as the crop allows.

A plain JPEG is decoded by simplejpeg at the smallest DCT scale that still covers the crop, of those that are a power
of two: libjpeg-turbo decodes the others without SIMD, 5/8 takes longer than the whole. What is left to shrink, mostly
less than twofold, is OpenCV's, whose INTER_AREA would take longer than the decoding (docs/measurements.md).
All else (PNG, WebP, CMYK and slightly damaged JPEG) goes through Pillow; transparency is laid over white. The EXIF
orientation is ignored, as img2dataset, CLIP and torchvision do: web images have theirs applied when downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.augment import Box
from data_pipelines.errors import SampleError

MAX_PIXELS = 64_000_000  # an 8000 x 8000 photograph; a decompression bomb declares far more
MAX_SCANS = 100  # of a JPEG; progressive ones have about ten, and each decodes the whole image once more
FORMATS = ("JPEG", "PNG", "WebP")  # Pillow's other decoders are never offered untrusted bytes

_SIGNATURES = (
    *((b"\xff\xd8", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF")),
    *((b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF")),
    *((b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"\0\0\0\x0cjP  ", "JPEG 2000")),
    *((b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\0\0\1\0", "ICO"), (b"8BPS", "PSD")),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIC")

Image.MAX_IMAGE_PIXELS = None  # Pillow would print warnings above its own bound, before ours is looked at

ChooseBox = Callable[[int, int], Box]  # (height, width) -> crop


def decode_crop(data: bytes, choose_box: ChooseBox, size: int) -> np.ndarray:
    """Decodes an image, crops it and resizes the crop.

    Args:
        data: JPEG, PNG or WebP.
        choose_box: Given the full height and width, read from the header before any pixel is decoded.
        size: Side of the result in pixels.

    Returns:
        (size, size, 3) uint8, RGB.

    Raises:
        SampleError: Not an image, damaged, or too large.
    """
    crop, flip = _crop_jpeg(data, choose_box, size) or _crop_any(data, choose_box)
    if crop.shape[:2] != (size, size):
        crop = _resized(crop, size)
    return cv2.flip(crop, 1) if flip else np.ascontiguousarray(crop)


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


def check_image(data: bytes) -> None:
    """Raises SampleError where `decode_crop` would; decodes the whole image."""
    _ = _crop_jpeg(data, _whole, 1) or _crop_any(data, _whole)


def _whole(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    shrink = max(crop.shape[:2]) / size
    if shrink <= 2:  # up to there linear, and up to 1.4 cubic, is nearer to Lanczos than Pillow's bilinear
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_CUBIC if shrink <= 1.4 else cv2.INTER_LINEAR)
    import torch  # takes a second, and packing never resizes

    pixels = torch.tensor(crop).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _crop_jpeg(data: bytes, choose_box: ChooseBox, size: int) -> tuple[np.ndarray, bool] | None:
    if not data.startswith(b"\xff\xd8"):
        return None
    if data.count(b"\xff\xda") > MAX_SCANS:  # no entropy-coded byte looks like the beginning of a scan
        raise SampleError(f"image of more than {MAX_SCANS} scans")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
        if colours not in ("YCbCr", "Gray", "RGB"):
            return None
        _check_pixels(height, width)
        box = choose_box(height, width)
        eighths = next((k for k in (1, 2, 4) if min(box.height, box.width) * k >= 8 * size), 8)
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height * eighths // 8), min_width=-(-width * eighths // 8))
    except ValueError:
        return None  # Pillow forgives what can be forgiven, such as stray bytes between segments
    return _cut(pixels, box, height, width), box.flip


def _cut(pixels: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    # The box was chosen in full-size pixels; the decoded image may be smaller.
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    top, left = round(box.top * down), round(box.left * across)
    bottom = max(top + 1, round((box.top + box.height) * down))
    right = max(left + 1, round((box.left + box.width) * across))
    return pixels[top:bottom, left:right]


def _crop_any(data: bytes, choose_box: ChooseBox) -> tuple[np.ndarray, bool]:
    try:
        with Image.open(io.BytesIO(data), formats=[name.upper() for name in FORMATS]) as image:
            _check_pixels(image.height, image.width)
            box = choose_box(image.height, image.width)
            crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
            return np.asarray(_rgb(crop)), box.flip
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like on damaged bytes
        raise SampleError(f"image cannot be decoded ({type(error).__name__})") from error


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise SampleError(f"image of {width} x {height} pixels is larger than {MAX_PIXELS:,}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
