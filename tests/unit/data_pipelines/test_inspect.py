"""`inspect` shows the same samples each time, in any script, and nothing in a caption can act on its page."""

import base64
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from corpus import Members, jpeg, make_corpus, member
from PIL import Image

from data_pipelines.__main__ import main
from data_pipelines.shards.writer import write_shard
from data_pipelines.tools.inspection import THUMBNAIL, Inspection, choose, inspect
from data_pipelines.tools.report import html_report
from data_pipelines.tools.sources import load_sources

HOSTILE = "<script>alert(1)</script> \"quoted\" & <img src=x onerror='alert(2)'>"


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser sees them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def inspected(*names: Path, scratch: Path, samples: int = 64, seed: int = 0) -> Inspection:
    sources = load_sources([str(name) for name in names], scratch, processes=1)
    return inspect([str(name) for name in names], sources, samples=samples, seed=seed, processes=1)


def test_a_page_is_written_and_the_same_call_shows_the_same_samples(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    manifest = make_corpus(tmp_path / "c", tmp_path, (30, 20)).manifest
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ["inspect", str(manifest), "-o", str(tmp_path / name), "--samples", "12", "--seed", str(seed)]
        assert main([*arguments, "--processes", "1"]) == 0
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert page.count("<figure>") >= 12
        pages.append(re.findall('data:image/jpeg[^"]+', page))
    assert pages[0] == pages[1] != pages[2]
    out = capfd.readouterr().out
    assert "12 of 50 samples" in out
    assert re.search(r"one core decodes [\d,]+ samples/s", out)


def test_samples_are_drawn_from_equal_stretches_of_all():
    chosen = choose(1000, 10, 0)
    assert (chosen // 100).tolist() == list(range(10))
    assert choose(1000, 10, 1).tolist() != chosen.tolist() == choose(1000, 10, 0).tolist()
    assert choose(3, 10, 0).tolist() == [0, 1, 2]


def test_what_looks_like_a_tag_in_a_caption_or_a_key_stays_text(tmp_path: Path):
    samples: list[Members] = [
        member(0) | {"__key__": "<q>key", "txt": HOSTILE.encode(), "json": b'{"<i>field": 1}'},
        member(1) | {"__key__": "<u>bad", "jpg": b"junk"},
    ]
    write_shard(tmp_path / "a.tar", samples)
    text = html_report(inspected(tmp_path, scratch=tmp_path))
    page = Page(text)
    assert not {"script", "q", "i", "u"} & set(page.tags)
    assert page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert ("title", HOSTILE) in page.attributes
    for shown in ("<q>key", "<u>bad", "<i>field"):
        assert shown in page.text


def test_a_page_needs_no_other_file_and_holds_the_pictures(tmp_path: Path):
    manifest = make_corpus(tmp_path / "c", tmp_path, (3,)).manifest
    page = Page(html_report(inspected(manifest, scratch=tmp_path)))
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 3
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == THUMBNAIL
    assert not {"link", "iframe", "object", "script"} & set(page.tags)


def test_a_page_tells_sizes_problems_and_duplicates(tmp_path: Path):
    same = {"jpg": jpeg(0, 30, 90)}
    samples = [member(0) | same, member(1) | same, member(2) | {"jpg": jpeg(2)[:300]}, {"__key__": "none", "txt": b"x"}]
    write_shard(tmp_path / "a.tar", samples)
    found = inspected(tmp_path, scratch=tmp_path)
    assert [(group.kind, group.samples, len(group.pictures)) for group in found.groups] == [("image", 2, 2)]
    assert {problem.key for problem in found.problems} == {"00002", "none"}
    assert found.samples_per_s > 0
    assert found.mb_per_s == pytest.approx(found.samples_per_s * len(same["jpg"]) / 1e6)
    page = Page(html_report(found))
    for words in (
        "2 samples with one image",
        "no image",
        "image cannot be decoded",
        "Width in pixels",
        "90\u00a0x\u00a030",
    ):
        assert words in unescape(page.text)
    assert page.tags.count("svg") == 7


def test_a_picture_stands_upright(tmp_path: Path):
    image, exif, out = Image.new("RGB", (80, 60), "blue"), Image.Exif(), io.BytesIO()
    image.paste("red", (0, 0, 40, 60))
    exif[0x0112] = 6  # a viewer shows red above blue
    image.save(out, "PNG", exif=exif)
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "png": out.getvalue(), "txt": b"red above blue"}])
    (picture,) = inspected(tmp_path, scratch=tmp_path).pictures
    assert (picture.width, picture.height) == (60, 80)
    width, height = picture.thumbnail.size
    top, bottom = (picture.thumbnail.getpixel((width // 2, at)) for at in (height // 8, height * 7 // 8))
    assert (top, bottom) == ((255, 0, 0), (0, 0, 255))


def test_a_corpus_in_which_no_image_decodes_still_has_a_page(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [member(0) | {"jpg": b"junk"}])
    arguments = ["inspect", str(tmp_path), "-o", str(tmp_path / "out"), "--processes", "1"]
    assert main(arguments) == 0
    assert "image cannot be decoded" in (tmp_path / "out" / "report.html").read_text()


def test_numbers_come_before_the_samples_and_the_values_of_json_are_told(tmp_path: Path):
    score = json.dumps({"similarity": 0.31, "lang": "de"}).encode()
    write_shard(tmp_path / "a.tar", [member(0) | {"json": score}, member(1), member(2) | {"jpg": jpeg(1)}])
    text = Page(html_report(inspected(tmp_path, scratch=tmp_path))).text
    order = [
        "decoded per second",
        "Sizes and lengths",
        "Distributions",
        "Fields of json",
        "Problems",
        "Duplicates",
        "Samples",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    for words in ("0.31 to 0.31", "de", "0 to 2", "MB of a shard", "2 samples with one image"):
        assert words in text or words.split(" to ")[0] in text
    assert "e+0" not in text


def test_duplicates_are_folded_and_sizes_stay_on_one_line(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [member(0), member(1) | {"jpg": jpeg(0)}])
    page = html_report(inspected(tmp_path, scratch=tmp_path))
    assert "<details><summary>2 samples with one image</summary>" in page
    assert "<b>24&nbsp;x&nbsp;20</b>" in page
