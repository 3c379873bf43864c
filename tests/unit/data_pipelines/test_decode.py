"""Images decode as Pillow decodes them, only faster; crops are keyed by position."""

import io
import re
import struct
import zlib
from random import Random

import numpy as np
import pytest
from corpus import jpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipelines.config import AugmentConfig
from data_pipelines.errors import SampleError
from data_pipelines.samples import decode
from data_pipelines.samples.augment import Augmentation, Box, centre_box, random_box
from data_pipelines.samples.decode import check_image, decode_crop
from data_pipelines.shards.header import image_format, read_header, size_of


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def smooth(height: int, width: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin((x + y) / 40)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def reference(data: bytes, box: Box, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    out = image.resize((size, size), Image.Resampling.BOX, box=corners)
    return np.asarray(out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.flip else out).astype(int)


boxes = [Box(0, 0, 480, 640), Box(50, 100, 300, 280), Box(3, 7, 120, 111, True), Box(200, 300, 33, 40)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("box", boxes)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_crop_is_what_pillow_makes_of_it(form: str, box: Box, size: int):
    data = encoded(smooth(480, 640), form, quality=92)
    pixels = decode_crop(data, lambda height, width: box, size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels - reference(data, box, size))
    assert difference.mean() < 2.5
    assert difference.max() < 24


# Whole pixels at every scale: a shift by half a pixel would blur the comparison.
@pytest.mark.parametrize(
    "box", [Box(48, 96, 304, 280), Box(8, 8, 120, 112, True), Box(40, 64, 120, 400), Box(64, 40, 400, 120)]
)
def test_decoding_at_a_smaller_scale_loses_no_detail_of_the_crop(box: Box):
    blocks = np.random.default_rng(0).integers(0, 2, (60, 80, 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1) * 255
    data = encoded(Image.fromarray(blocks.repeat(3, 2)), "JPEG", quality=95)
    for size in (48, 64, 100):
        pixels, expected = decode_crop(data, lambda height, width: box, size), reference(data, box, size)
        assert pixels.std() == pytest.approx(expected.std(), rel=0.12)
        assert np.abs(pixels - expected).mean() < 0.16 * expected.std()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_without_rgb_become_rgb(mode: str):
    data = encoded(smooth(100, 120, mode), "JPEG", quality=95)
    difference = np.abs(decode_crop(data, centre_box, 50) - reference(data, centre_box(100, 120), 50))
    assert difference.mean() < 3


def exact(data: bytes, **options: bool) -> np.ndarray:
    """The pixels of a 48 x 48 image."""
    return decode_crop(data, lambda height, width: Box(0, 0, height, width), 48, **options).astype(int)


def portrait(side: int = 48) -> Image.Image:
    """A square in which no turn or mirroring goes unnoticed."""
    image = Image.new("RGB", (side, side), "blue")
    image.paste("red", (0, 0, side // 2, side // 2))
    image.paste("green", (side // 2, 0, side, side // 4))
    return image


def exif(orientation: int, order: str = "MM", kind: int = 3) -> bytes:
    sign = "<" if order == "II" else ">"
    number = struct.pack(sign + {1: "B", 3: "H", 4: "I"}.get(kind, "H"), orientation).ljust(4, b"\0")
    entries = struct.pack(f"{sign}HHI4s", 0x010F, 2, 1, b"x") + struct.pack(f"{sign}HHI", 0x0112, kind, 1) + number
    head = order.encode() + struct.pack(f"{sign}HIH", 42, 8, 2)
    return b"Exif\0\0" + head + entries + bytes(4)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    parts = (bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content for marker, content in segments)
    return jpeg[:2] + b"".join(parts) + jpeg[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(bits: int, colours: int, row: bytes, *chunks: bytes, width: int = 2) -> bytes:
    """A PNG of one row."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_seen_as_viewers_turn_it(form: str, orientation: int):
    data = encoded(smooth(120, 200), form, exif=exif(orientation), quality=95)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert turned is not None
    height, width = turned.height, turned.width
    assert (read_header(data).upright_size, size_of(data)) == ((height, width), (height, width))
    upright = encoded(turned, "PNG")
    for box in (Box(0, 0, height, width), Box(10, 20, 60, 50), Box(7, 3, 100, 90, True), centre_box(height, width)):
        asked: list[tuple[int, int]] = []

        def choose(h: int, w: int, box: Box = box, asked: list[tuple[int, int]] = asked) -> Box:
            asked.append((h, w))
            return box

        seen = decode_crop(data, choose, 40).astype(int)
        assert asked == [(height, width)]
        assert np.abs(seen - decode_crop(upright, lambda h, w, box=box: box, 40)).mean() < 2
    check_image(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_can_be_left_alone(form: str):
    turned, plain = (encoded(portrait(), form, **given) for given in ({"exif": exif(6)}, {}))
    assert np.array_equal(exact(turned, exif_orientation=False), exact(plain))
    assert not np.array_equal(exact(turned), exact(plain))


TURNED = {
    "little-endian": exif(6, "II"),
    "a long": exif(6, "MM", 4),
    "a long, little-endian": exif(6, "II", 4),
    "a byte": exif(6, "MM", 1),
    "its prefix twice": b"Exif\0\0" + exif(6),
    "garbage behind it": exif(6) + b"\xff\xda" * 200,
}
BROKEN = {
    "empty": b"Exif\0\0",
    "no TIFF": b"Exif\0\0hello, world",
    "cut short": exif(6)[:20],
    "cut in the number": exif(6)[:37],
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "orientation 65535": exif(65535),
    "as text": exif(6, kind=2),
    "of an unknown kind": exif(6, kind=99),
    "directory far away": b"Exif\0\0MM\0*\xff\xff\xff\xff" + exif(6)[14:],
    "directory of 65535 entries": exif(6)[:14] + b"\xff\xff" + bytes(60),
    "directory in itself": b"Exif\0\0MM\0*" + bytes(40),
    "BigTIFF": b"Exif\0\0MM\0+" + exif(6)[10:],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", [*TURNED, *BROKEN])
def test_whatever_the_exif_an_image_is_read_and_turned_where_it_says_how(form: str, name: str):
    plain, said = encoded(portrait(), form, quality=95), (TURNED | BROKEN)[name]
    if form == "JPEG":
        data = with_segments(plain, (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), (0xE1, said))
    elif form == "PNG":
        data = plain[:33] + chunk(b"eXIf", said) + plain[33:]
    else:
        body = b"VP8X" + struct.pack("<IB3x", 10, 8) + bytes((47, 0, 0, 47, 0, 0)) + plain[12:]
        body += b"EXIF" + struct.pack("<I", len(said)) + said + bytes(len(said) % 2)
        data = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    seen = exact(plain)
    assert np.abs(exact(data) - (np.rot90(seen, -1) if name in TURNED else seen)).max() <= 1


def progressive() -> bytes:
    return encoded(portrait(), "JPEG", quality=95, progressive=True)


def padded(data: bytes, marker: bytes) -> bytes:
    """Fill bytes before a marker, as the standard allows (B.1.1.2)."""
    return data.replace(marker, b"\xff\xff" + marker, 1)


PLAIN = encoded(portrait(), "JPEG", quality=95)
SCANS = b"\xff\xda\0\2" * 150
NOT_THE_IMAGE = {
    "an MP4 behind it": PLAIN + b"\0\0\0\x18ftypmp42" + SCANS,
    "a ZIP behind it": PLAIN + b"PK\3\4" + SCANS,
    "another JPEG behind it": PLAIN + encoded(smooth(90, 70), "JPEG"),
    "zeros behind it": PLAIN + bytes(1000),
    "scans behind a progressive one": progressive() + SCANS,
    "progressive ones behind one": progressive() + progressive() * 20,
    "two bytes of scans in a comment": with_segments(progressive(), (0xFE, SCANS)),
    "scans in a profile": with_segments(progressive(), (0xE2, b"ICC_PROFILE\0\1\1" + SCANS)),
    "a thumbnail": with_segments(PLAIN, (0xE1, exif(1) + encoded(smooth(30, 20), "JPEG"))),
    "a profile of 2 MB": with_segments(PLAIN, *((0xE2, b"ICC_PROFILE\0%c\x28" % n + bytes(60_000)) for n in range(40))),
    "a profile without its parts": with_segments(PLAIN, (0xE2, b"ICC_PROFILE\0\7\x09" + bytes(90))),
    "a broken list of pictures": with_segments(PLAIN, (0xE2, b"MPF\0MM\0*" + b"\xff" * 60)),
    "a broken Photoshop block": with_segments(PLAIN, (0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 9)),
    "two EXIF blocks": with_segments(PLAIN, (0xE1, exif(1)), (0xE1, exif(6))),
    "fill bytes": padded(PLAIN, b"\xff\xdb"),
    "fill bytes before a scan": padded(progressive(), b"\xff\xda"),
    "restarts": encoded(portrait(), "JPEG", quality=95, restart_marker_blocks=1),
    "stray bytes": PLAIN[:20] + b"\0\0" + PLAIN[20:],
    "stray bytes at the beginning": PLAIN[:2] + b"\0\0" + PLAIN[2:],
    "stray bytes and a broken list of pictures": PLAIN[:2] + b"\0" + with_segments(PLAIN, (0xE2, b"MPF\0MM\0*"))[2:],
    "no end": PLAIN[:-2],
    "no end, progressive": progressive()[:-2],
    "half an end": PLAIN[:-1],
    "fill bytes before the end": PLAIN[:-2] + b"\xff\xff\xd9",
}


@pytest.mark.parametrize("name", NOT_THE_IMAGE)
def test_bytes_of_a_jpeg_that_are_not_its_pixels_change_nothing(name: str, recwarn: pytest.WarningsRecorder):
    assert np.abs(exact(NOT_THE_IMAGE[name]) - np.asarray(portrait()).astype(int)).mean() < 3
    assert size_of(NOT_THE_IMAGE[name]) == (48, 48)
    check_image(NOT_THE_IMAGE[name])
    assert not recwarn.list


def with_chunks(before: bytes = b"", after: bytes = b"") -> bytes:
    data = encoded(portrait(), "PNG")
    return data[:33] + before + data[33:-12] + after + data[-12:]


LONG_TEXT = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * (3 << 20)))
PNGS = {
    "a text of 3 MiB": with_chunks(LONG_TEXT),
    "a text of 3 MiB behind the pixels": with_chunks(after=LONG_TEXT),
    "80 texts of 1 MB": with_chunks(80 * chunk(b"tEXt", b"a\0" + b"x" * 1_000_000)),
    "a profile of 3 MiB": with_chunks(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20)))),
    "a profile that cannot be unpacked": with_chunks(chunk(b"iCCP", b"p\0\0" + b"junk")),
    "a text whose checksum is wrong": with_chunks(LONG_TEXT[:-4] + b"\0\0\0\0"),
    "a broken resolution": with_chunks(chunk(b"pHYs", b"\1")),
    "a broken gamma": with_chunks(chunk(b"gAMA", b"")),
    "a broken animation": with_chunks(chunk(b"acTL", b"\0")),
    "bytes behind it": with_chunks() + b"PK\3\4" + bytes(99),
    "more than one frame": encoded(portrait(), "PNG", save_all=True, append_images=[smooth(48, 48)]),
}


@pytest.mark.parametrize("name", PNGS)
def test_chunks_that_the_pixels_of_a_png_do_not_need_never_refuse_it(name: str):
    assert np.array_equal(exact(PNGS[name]), np.asarray(portrait()))
    check_image(PNGS[name])


def test_of_a_webp_the_first_frame_is_seen():
    data = encoded(portrait(), "WEBP", lossless=True, save_all=True, append_images=[smooth(48, 48)])
    assert np.array_equal(exact(data), np.asarray(portrait()))
    assert size_of(data) == (48, 48)


def key(*numbers: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(numbers)}H", *numbers))


def palette(*alphas: int) -> bytes:
    return chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60))) + (chunk(b"tRNS", bytes(alphas)) if alphas else b"")


WHITE = [255, 255, 255]
TRANSPARENT = {  # two pixels each: the PNG, and what is seen over white
    "grey, 1 bit, black": (png(1, 0, b"\x40", key(0)), [WHITE, WHITE]),
    "grey, 1 bit, white": (png(1, 0, b"\x40", key(1)), [[0, 0, 0], WHITE]),
    "grey, 2 bits": (png(2, 0, b"\x60", key(1)), [WHITE, [170, 170, 170]]),
    "grey, 4 bits": (png(4, 0, b"\x34", key(3)), [WHITE, [68, 68, 68]]),
    "grey, 4 bits, black": (png(4, 0, b"\x04", key(0)), [WHITE, [68, 68, 68]]),
    "grey, 8 bits": (png(8, 0, b"\x03\x04", key(3)), [WHITE, [4, 4, 4]]),
    "grey, 16 bits": (png(16, 0, b"\x12\x34\x12\x35", key(0x1234)), [WHITE, [18, 18, 18]]),
    "grey, 16 bits, none": (png(16, 0, b"\x12\x34\xff\xff"), [[18, 18, 18], WHITE]),
    "RGB, 8 bits": (png(8, 2, bytes((1, 2, 3, 1, 2, 4)), key(1, 2, 3)), [WHITE, [1, 2, 4]]),
    "RGB, 16 bits": (png(16, 2, b"\1\2\3\4\5\6\1\2\3\4\5\7", key(0x102, 0x304, 0x506)), [WHITE, [1, 3, 5]]),
    "palette, 1 bit": (png(1, 3, b"\x40", palette(0)), [WHITE, [40, 50, 60]]),
    "palette, 2 bits": (png(2, 3, b"\x10", palette(0)), [WHITE, [40, 50, 60]]),
    "palette, 4 bits": (png(4, 3, b"\x01", palette(255, 0)), [[10, 20, 30], WHITE]),
    "palette, 8 bits, half": (png(8, 3, b"\0\1", palette(0, 51)), [WHITE, [212, 214, 216]]),
    "palette, 8 bits, none": (png(8, 3, b"\0\1", palette()), [[10, 20, 30], [40, 50, 60]]),
    "grey with alpha, 8 bits": (png(8, 4, b"\x09\0\x09\xff"), [WHITE, [9, 9, 9]]),
    "grey with alpha, 16 bits": (png(16, 4, b"\x09\0\0\0\x09\0\xff\xff"), [WHITE, [9, 9, 9]]),
    "RGB with alpha, 8 bits": (png(8, 6, b"\1\2\3\0\1\2\3\x33"), [WHITE, [204, 204, 205]]),
    "RGB with alpha, 16 bits": (png(16, 6, b"\1\0\2\0\3\0\0\0\1\0\2\0\3\0\xff\xff"), [WHITE, [1, 2, 3]]),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_in_a_png_is_white_at_any_depth(name: str):
    data, expected = TRANSPARENT[name]
    for column in range(2):
        pixel = decode_crop(data, lambda height, width, column=column: Box(0, column, 1, 1), 1)
        assert np.abs(pixel[0, 0].astype(int) - expected[column]).max() <= 1


def test_what_is_transparent_in_a_webp_is_white():
    data = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", lossless=True)
    assert decode_crop(data, centre_box, 4).min() == 255


def test_whatever_becomes_of_its_bytes_an_image_is_read_or_refused_by_one_sentence(
    recwarn: pytest.WarningsRecorder,
):
    rng, said = Random(0), set()
    forms = [encoded(portrait(), form, exif=exif(6)) for form in ("JPEG", "PNG", "WEBP")]
    forms += [progressive(), encoded(portrait().convert("P"), "PNG", transparency=0), TRANSPARENT["RGB, 16 bits"][0]]
    for number in range(900):
        data = bytearray(forms[number % len(forms)])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(data), rng.choice((64, 800, len(data)))))
            data[at : at + rng.choice((0, 1, 1, 2))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        del data[rng.choice((len(data), len(data), rng.randrange(len(data)))) :]
        try:
            height, width = read_header(bytes(data)).upright_size
            assert min(height, width) > 0
            assert decode_crop(bytes(data), centre_box, 8).shape == (8, 8, 3)
        except SampleError as error:
            said.add(re.sub(r"^[A-Z].*(?= is not)|\d+ x \d+|: .*", "", str(error)))
    assert said <= {"image cannot be decoded", " is not supported", "image of  pixels is larger than 64,000,000"}
    assert not recwarn.list, "nothing of Pillow's is shown"


def test_palettes_are_read_at_their_true_brightness():
    data = encoded(Image.new("RGB", (8, 8), (10, 200, 30)).convert("P"), "PNG")
    assert decode_crop(data, centre_box, 4)[0, 0].tolist() == pytest.approx([10, 200, 30], abs=30)


@pytest.mark.parametrize("data", [jpeg(0)[:300], jpeg(0)[:-900], encoded(portrait(), "PNG")[:-40]])
def test_what_is_no_whole_image_is_refused(data: bytes):
    for use in (exact, check_image):
        with pytest.raises(SampleError, match="image cannot be decoded: (it is cut short|its size is unknown)"):
            use(data)


def at_frame(data: bytes, offset: int, new: bytes, marker: int = 0xC0) -> bytes:
    at = data.index(b"\xff\xc0")
    data = data[: at + 1] + bytes((marker,)) + data[at + 2 :]
    return data[: at + offset] + new + data[at + offset + len(new) :]


CONVERT = "is not supported: convert it to JPEG, PNG or WebP"
REFUSED = {
    b"": "image cannot be decoded: it is empty",
    b"not an image": "image cannot be decoded: it is no JPEG, PNG or WebP",
    b"\r\n" + PLAIN: "image cannot be decoded: it is no JPEG, PNG or WebP",
    b"<!DOCTYPE html><html>": "image cannot be decoded: it is HTML or XML",
    b"\n<?xml version='1.0'?><svg/>": "image cannot be decoded: it is HTML or XML",
    encoded(portrait(), "GIF", save_all=True, append_images=[smooth(48, 48)]): f"GIF {CONVERT}",
    encoded(portrait(), "BMP"): f"BMP {CONVERT}",
    encoded(portrait(), "TIFF"): f"TIFF {CONVERT}",
    encoded(portrait(), "AVIF"): f"AVIF {CONVERT}",
    b"\0\0\0\x18ftypheic": f"HEIC {CONVERT}",
    b"\xff\x0a\0\0": f"JPEG XL {CONVERT}",
    b"\xff\xd8\xff": "image cannot be decoded: its size is unknown",
    b"\x89PNG\r\n\x1a\n": "image cannot be decoded: its size is unknown",
    b"RIFF\4\0\0\0WEBP": "image cannot be decoded: its size is unknown",
    b"RIFF\4\0\0\0WEBPVP8X\x0a\0\0\0\0": "image cannot be decoded: its size is unknown",
    at_frame(
        PLAIN, 5, b"\0\0"
    ): "image cannot be decoded: its size is unknown",  # told after the pixels (DNL), which libjpeg does not look at
    at_frame(PLAIN, 4, b"\x0c"): "image cannot be decoded: 12 bits per colour",
    at_frame(PLAIN, 4, b"\x08", 0xC5): "image cannot be decoded: hierarchical JPEG",
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.items())
def test_what_is_refused_is_told_for_what_it_is(data: bytes, reason: str):
    for use in (exact, check_image):
        with pytest.raises(SampleError, match=reason):
            use(data)
    if "bits" not in reason and "hier" not in reason:
        assert size_of(data) == (0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    data = encoded(smooth(100, 100), form)
    with pytest.raises(SampleError, match="image of 100 x 100 pixels is larger than 99"):
        decode_crop(data, centre_box, 8)
    with pytest.raises(SampleError, match="image of 100 x 100 pixels is larger than 99"):
        check_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [8, 30, 90, 200])
def test_of_a_jpeg_the_pixels_that_are_decoded_count(mode: str, size: int, monkeypatch: pytest.MonkeyPatch):
    # As a photograph of 108 megapixels: larger than the bound, and half or a quarter of it is not.
    monkeypatch.setattr(decode, "MAX_PIXELS", 200 * 240 // 4)
    data = encoded(smooth(200, 240, mode), "JPEG", quality=95)
    difference = np.abs(decode_crop(data, centre_box, size) - reference(data, centre_box(200, 240), size))
    assert difference.mean() < 3
    check_image(data)


def test_a_jpeg_in_several_scans_is_bounded_as_it_is_stored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MAX_BUFFERED_PIXELS", 99)
    with pytest.raises(SampleError, match="image of 48 x 48 pixels in several scans is larger than 99"):
        decode_crop(progressive(), centre_box, 8)
    assert decode_crop(PLAIN, centre_box, 8).shape == (8, 8, 3)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded():
    # Each scan decodes the whole image once more: 51 kB can take ten seconds.
    data = progressive()
    last = data.rindex(b"\xff\xda")
    for times, tail in ((91, b""), (91, SCANS)):  # nine scans are before the last
        assert decode_crop(data[:last] + times * data[last:-2] + data[-2:] + tail, centre_box, 8).shape == (8, 8, 3)
    with pytest.raises(SampleError, match="image of more than 100 scans"):
        decode_crop(data[:last] + 92 * data[last:-2] + data[-2:], centre_box, 8)


def test_a_large_image_prints_no_warning(recwarn: pytest.WarningsRecorder):
    declared = encoded(Image.new("1", (9500, 9500)), "PNG")
    with pytest.raises(SampleError, match="image of 9500 x 9500 pixels is larger"):
        decode_crop(declared, centre_box, 8)
    assert not recwarn.list


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**62),
    st.sampled_from([(0.5, 1.0), (0.08, 1.0), (0.9, 1.0), (1.0, 1.0)]),
)  # fmt: skip
def test_a_random_box_lies_in_the_image(height: int, width: int, position: int, scale: tuple[float, float]):
    box = random_box(height, width, scale=scale, flip=True, seed=0, position=position)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert min(box.height, box.width) >= 1
    if min(height, width) > 300:  # rounding to pixels matters below
        share = box.height * box.width / (height * width)
        assert share <= scale[1] + 0.01
        assert share >= scale[0] - 0.01 or not 3 / 4 < width / height < 4 / 3
        assert 0.74 < box.width / box.height < 1.35


def test_random_boxes_are_keyed_by_seed_and_position_and_cover_their_range():
    def draw(position: int, seed: int = 0) -> Box:
        return random_box(400, 500, scale=(0.5, 1.0), flip=True, seed=seed, position=position)

    boxes = [draw(position) for position in range(2000)]
    assert boxes == [draw(position) for position in range(2000)]
    assert len(set(boxes)) > 1900
    assert draw(0) != draw(0, seed=1)
    shares = np.array([box.height * box.width for box in boxes]) / 200_000
    assert shares.mean() == pytest.approx(0.75, abs=0.01)
    assert np.mean([box.flip for box in boxes]) == pytest.approx(0.5, abs=0.05)
    assert not any(random_box(9, 9, scale=(0.5, 1), flip=False, seed=0, position=p).flip for p in range(50))


SIDED = (
    "A man on the LEFT.",
    "two birds; right",
    "a left-hand glove",
    "the rightmost house",
    "lefthand page",
    "top_right",
)
SIDED += ("topleft corner", "左边有一只猫", "猫在右側")
UNSIDED = ("a bright upright piano", "cleft copyright", "two birds", "一只猫", "")


@pytest.mark.parametrize("caption", [*SIDED, *UNSIDED])
def test_half_of_the_images_are_mirrored_but_none_whose_caption_names_a_side(caption: str):
    augmentation = Augmentation((0.5, 1.0), True, AugmentConfig(), seed=0)
    mirrored = [augmentation.box(90, 90, position=p, caption=caption).flip for p in range(2000)]
    assert np.mean(mirrored) == (0 if caption in SIDED else pytest.approx(0.5, abs=0.05))


def test_a_caption_changes_nothing_but_the_mirroring():
    augmentation = Augmentation((0.5, 1.0), True, AugmentConfig(), seed=0)
    for position in range(20):
        sided, plain = (augmentation.box(90, 90, position=position, caption=c) for c in ("left", "centre"))
        assert sided == plain._replace(flip=False)


def test_the_evaluation_crop_is_the_central_square():
    assert centre_box(100, 60) == Box(20, 0, 60, 60)
    assert centre_box(60, 101) == Box(0, 20, 60, 60)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "JPEG 2000"])
def test_the_format_of_an_image_is_what_its_first_bytes_say(name: str):
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, name.upper().replace(" ", ""))
    assert image_format(out.getvalue()) == name
    assert image_format(out.getvalue()[:32]) == name


@pytest.mark.parametrize("data", [b"", b"\xff", b"BM", b"BMW builds cars", b"RIFF\0\0\0\0WAVE", b"<svg", bytes(99)])
def test_bytes_of_no_image_have_no_format(data: bytes):
    assert image_format(data) == ""
