"""Images decode as Pillow decodes them, only faster; crops are keyed by position."""

import io

import numpy as np
import pytest
from corpus import jpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import decode
from data_pipelines.augment import Augmentation, Box, centre_box, random_box
from data_pipelines.config import AugmentConfig
from data_pipelines.decode import decode_crop, image_format
from data_pipelines.errors import SampleError


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


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(form: str):
    data = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), form, lossless=True)
    assert decode_crop(data, centre_box, 4).min() == 255


def test_palettes_and_16_bits_are_read_at_their_true_brightness():
    palette = encoded(Image.new("RGB", (8, 8), (10, 200, 30)).convert("P"), "PNG")
    assert decode_crop(palette, centre_box, 4)[0, 0].tolist() == pytest.approx([10, 200, 30], abs=30)
    deep = encoded(Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)), "PNG")
    assert decode_crop(deep, centre_box, 4)[0, 0].tolist() == [128, 128, 128]


def test_the_exif_orientation_is_ignored():
    image = smooth(40, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
    assert np.array_equal(decode_crop(turned, centre_box, 16), decode_crop(plain, centre_box, 16))


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff", jpeg(0)[:300], b"GIF89a" + bytes(20)])
def test_what_is_no_whole_image_is_refused(data: bytes):
    with pytest.raises(SampleError, match="image cannot be decoded"):
        decode_crop(data, centre_box, 8)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_that_declares_too_many_pixels_is_refused_before_it_is_decoded(
    form: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    with pytest.raises(SampleError, match="image of 10 x 10 pixels is larger than 99"):
        decode_crop(encoded(smooth(10, 10), form), centre_box, 8)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded():
    # Each scan decodes the whole image once more: 51 kB can take ten seconds.
    data = encoded(smooth(64, 64), "JPEG", progressive=True)
    assert decode_crop(data, centre_box, 8).shape == (8, 8, 3)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    with pytest.raises(SampleError, match="image of more than 100 scans"):
        decode_crop(data[:last] + 101 * scan + data[-2:], centre_box, 8)


def test_a_large_image_prints_no_warning(recwarn: pytest.WarningsRecorder):
    declared = encoded(Image.new("1", (9500, 9500)), "PNG")
    with pytest.raises(SampleError, match="image of 9500 x 9500 pixels is larger"):
        decode_crop(declared, centre_box, 8)
    assert not recwarn.list


def test_stray_bytes_in_a_jpeg_are_forgiven():
    data = jpeg(0)
    at = data.index(b"\xff\xdb")
    stray = data[:at] + b"\x00\x00" + data[at:]
    assert decode_crop(stray, centre_box, 8).shape == (8, 8, 3)


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
