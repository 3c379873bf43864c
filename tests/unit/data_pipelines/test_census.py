"""`stats` counts what is there; parts and merged counts agree to the last digit."""

import io
import json
import re
import statistics
from pathlib import Path

import pytest
from corpus import Members, caption, jpeg, make_corpus, member
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.__main__ import main
from data_pipelines.errors import DataError
from data_pipelines.shards.filters import Filters
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.sample import Fault
from data_pipelines.shards.writer import write_shard
from data_pipelines.tools.census import Census, take_census
from data_pipelines.tools.distribution import Distribution, JsonField
from data_pipelines.tools.scripts import script_of
from data_pipelines.tools.sources import by_source, load_sources, name_sources, spread
from http_server import ShardServer


def census_of(*names: object, **options: object) -> Census:
    return take_census(name_sources([str(name) for name in names]), processes=1, **options)  # pyright: ignore


def stats(*arguments: object, output: Path) -> dict[str, object]:
    assert main(["stats", *map(str, arguments), "-o", str(output), "--processes", "1"]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("text", "script"),
    [
        *(("A cat.", "Latin"), ("Ñandú", "Latin"), ("一只猫 cat", "Han"), ("ねこ猫猫猫", "Kana"), ("ネコ", "Kana")),
        *(("고양이", "Hangul"), ("кошка", "Cyrillic"), ("قطة", "Arabic"), ("बिल्ली", "Devanagari"), ("แมว", "Thai")),
        *(("γάτα", "Greek"), ("חתול", "Hebrew"), ("𠀋𠀋", "Han"), ("\uff41", "Latin"), ("\u16a0", "other")),
        *(("123 !?", "none"), ("😀", "none"), ("", "none"), ("ab вг", "Cyrillic")),
    ],
)
def test_a_caption_is_in_the_script_of_most_of_its_letters(text: str, script: str):
    assert script_of(text) == script


@given(st.lists(st.integers(0, 999), min_size=1), st.lists(st.integers(0, 10**7)))
def test_small_numbers_are_counted_exactly_and_merging_is_counting_all(small: list[int], others: list[int]):
    one, two, both = Distribution(), Distribution(), Distribution()
    for numbers, found in ((small, one), (others, two), (small + others, both)):
        for number in numbers:
            found.add(number)
    assert one.mean == pytest.approx(statistics.fmean(small))
    assert (one.least, one.most) == (min(small), max(small))
    for percent in (5, 50, 95):
        ordered = sorted(small)
        assert one.percentile(percent) == ordered[max(0, -(-len(small) * percent // 100) - 1)]
    one.merge(two)
    assert one == both


@given(st.lists(st.integers(1000, 10**9), min_size=1))
def test_large_numbers_are_known_to_three_digits_with_exact_sum_and_extremes(numbers: list[int]):
    found = Distribution()
    for number in numbers:
        found.add(number)
    exact = sorted(numbers)[max(0, -(-len(numbers) // 2) - 1)]
    assert 0.99 * exact <= found.percentile(50) <= exact
    assert (found.sum, found.least, found.most) == (sum(numbers), min(numbers), max(numbers))
    assert found.percentile(1) >= found.least
    assert len(found.counts) <= 900 * 7


def test_sizes_lengths_formats_scripts_and_fields_are_what_was_written(tmp_path: Path):
    png = io.BytesIO()
    Image.new("RGB", (30, 10)).save(png, "PNG")
    samples: list[Members] = [
        {"__key__": "a", "jpg": jpeg(0, 20, 40), "txt": b"two words", "json": b'{"lang": "en", "x": 1}'},
        {"__key__": "b", "jpg": jpeg(1, 40, 20), "txt": "一只猫".encode(), "json": b'{"lang": "zh"}'},
        {"__key__": "c", "png": png.getvalue(), "txt": b"one two three"},
    ]
    write_shard(tmp_path / "a.tar", samples)
    census = census_of(tmp_path)
    measured = {name: (found.least, found.most, found.sum) for name, found in census.measured.items()}
    sizes = [len(sample["jpg"] if "jpg" in sample else sample["png"]) for sample in samples]
    assert measured == {
        "width": (20, 40, 90),
        "height": (10, 40, 70),
        "aspect": (50, 300, 550),  # hundredths
        "image_bytes": (min(sizes), max(sizes), sum(sizes)),
        "caption_characters": (3, 13, 25),
        "caption_words": (1, 3, 6),
        "shard_bytes": ((tmp_path / "a.tar").stat().st_size,) * 3,
    }
    assert census.formats == {"JPEG": 2, "PNG": 1}
    assert census.scripts == {"Latin": 2, "Han": 1}
    content = stats(tmp_path, "--language-field", "lang", output=tmp_path / "stats.json")
    assert content["languages"] == {"en": 1, "none": 1, "zh": 1}
    assert content["scripts"] == census.scripts
    assert content["json_fields"]["lang"] == {"share": 2 / 3, "numbers": [], "texts": ["en", "zh"]}
    assert content["json_fields"]["x"]["share"] == 1 / 3
    assert content["aspect"]["mean"] == 1.833  # pyright: ignore


def test_exact_duplicates_are_counted_over_all_shards(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [member(0), member(1), member(2) | {"jpg": jpeg(0)}])
    again = caption(0).upper().replace(" ", "\n ").encode()  # case and white space do not count
    write_shard(tmp_path / "b.tar", [member(3) | {"jpg": jpeg(0)}, member(4) | {"txt": again}])
    census = census_of(tmp_path)
    assert census.duplicates() == {
        "images": {"repeated": 2, "groups": 1, "largest_group": 3},
        "captions": {"repeated": 1, "groups": 1, "largest_group": 2},
    }
    assert [group.tolist() for group in census.groups(0, 5)] == [[[0, 0], [0, 2], [1, 0]]]
    assert [group.tolist() for group in census.groups(1, 5)] == [[[0, 0], [1, 1]]]


def test_sizes_are_those_of_the_turned_image(tmp_path: Path):
    image, out = Image.open(io.BytesIO(jpeg(0, 30, 90))), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(out, "JPEG", exif=exif)
    write_shard(tmp_path / "a.tar", [member(0) | {"jpg": out.getvalue()}])
    measured = census_of(tmp_path).measured
    assert (measured["width"].most, measured["height"].most, measured["aspect"].most) == (30, 90, 33)


def test_unusable_samples_are_counted_by_reason_and_those_that_filters_left_out_apart(tmp_path: Path):
    bad: list[Members] = [
        {"__key__": "a", "txt": b"x"},
        member(1) | {"txt": b"\xff"},
        member(2) | {"jpg": b"junk"},
        member(3) | {"txt": b""},
    ]
    write_shard(tmp_path / "a.tar", [*bad, member(4), member(5) | {"txt": b"long " * 50}])
    expected = {"no image": 1, Fault.BAD_CAPTION.reason: 1, "image cannot be decoded: it is no JPEG, PNG or WebP": 1}
    expected[Fault.EMPTY_CAPTION.reason] = 1
    census = census_of(tmp_path)
    assert (census.unusable, census.samples, census.left_out) == (expected, 2, 0)
    assert {problem.key for problem in census.examples} == {"a", "00001", "00002", "00003"}
    filters = Filters(caption_characters=(1, 100))
    manifest, _ = build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", filters=filters, processes=1)
    manifest.save()
    census = census_of(tmp_path / "m.json")
    assert (census.samples, census.left_out) == (1, 1)  # the long one


def test_parts_in_any_order_merge_to_exactly_the_whole(tmp_path: Path):
    manifest = make_corpus(
        tmp_path / "c", tmp_path, (9, 5, 1, 8), lambda i, m: m | ({"txt": b""} if i % 7 == 3 else {})
    ).manifest
    whole = stats(manifest, output=tmp_path / "whole.json")
    for part in range(3):
        arguments = ["stats", str(manifest), "-o", str(tmp_path / "p.json"), "--shard", f"{part}/3"]
        assert main([*arguments, "--processes", "1"]) == 0
    parts = sorted(tmp_path.glob("p.*.npz"), reverse=True)
    assert [path.name for path in parts][-1] == "p.00000-of-00003.npz"
    assert stats("--merge", *parts, output=tmp_path / "merged.json") == whole
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_parts_that_are_no_whole_are_refused_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    manifest = make_corpus(tmp_path / "c", tmp_path, (3, 3)).manifest
    for part in range(2):
        main(["stats", str(manifest), "-o", str(tmp_path / "p.json"), "--shard", f"{part}/2", "--processes", "1"])
    first, second = sorted(map(str, tmp_path.glob("p.*.npz")))
    junk = tmp_path / "junk.npz"
    junk.write_bytes(b"junk")
    capfd.readouterr()
    for given_parts, sentence in (
        ([first], "The parts 0/2 are not all parts of one whole, each once: give those of one `stats`."),
        ([first, second, second], "The parts 0/2, 1/2, 1/2 are not all parts of one whole"),
        ([str(junk)], f"{junk} is no part of a census (ValueError): give the .npz files of `stats --shard`."),
        ([str(tmp_path / "none.npz")], f"{tmp_path / 'none.npz'} cannot be opened (No such file or directory)"),
    ):
        assert main(["stats", "--merge", *given_parts, "-o", str(tmp_path / "x.json")]) == 4
        assert capfd.readouterr().err.startswith(sentence)


def test_a_sample_of_the_corpus_is_spread_evenly_over_it(tmp_path: Path):
    manifest = make_corpus(tmp_path / "c", tmp_path, (40, 10, 50)).manifest
    sources = load_sources([str(manifest)], tmp_path)
    chosen = {source.number: numbers.tolist() for source, numbers in by_source(sources, spread(100, 10))}
    assert chosen == {0: [0, 10, 20, 30], 1: [0], 2: [0, 10, 20, 30, 40]}
    census = take_census(sources, limit=10, processes=1)
    assert census.samples == 10
    assert census.fields == {"index": JsonField(10, [0.0, 90.0])}
    assert stats(manifest.parent, "--sample", 10, output=tmp_path / "s.json")["samples"] == 10


def test_a_missing_shard_is_an_error_of_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    manifest = make_corpus(tmp_path / "c", tmp_path, (3, 3)).manifest
    (manifest.parent / "00001.tar").unlink()
    assert main(["stats", str(manifest), "-o", str(tmp_path / "s.json"), "--processes", "1"]) == 4
    assert f"Shard {manifest.parent / '00001.tar'} is in the manifest but cannot be found" in capfd.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_a_shard_whose_manifest_counts_other_samples_is_refused(tmp_path: Path):
    make_corpus(tmp_path / "c", tmp_path, (3,))
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 3', '"samples": 4'))
    with pytest.raises(DataError, match=r"holds 3 samples but the manifest counts 4: it has changed; restore it, or"):
        census_of(manifest)


def test_a_remote_shard_is_read_in_large_pieces_when_all_of_it_is_and_else_by_the_sample(tmp_path: Path):
    make_corpus(tmp_path / "c", tmp_path, (40,))
    server = ShardServer()
    try:
        url = server.put("00000.tar", (tmp_path / "c" / "00000.tar").read_bytes())
        sources = load_sources([url], tmp_path, processes=1)
        server.requests.clear()
        assert take_census(sources, processes=1).samples == 40
        assert len(server.requests) == 1
        server.requests.clear()
        assert take_census(sources, limit=2, processes=1).samples == 2
        ranges = [re.findall(r"\d+", request.range) for request in server.requests]
        assert [int(last) - int(first) < 10_000 for first, last in ranges] == [True, True]  # a sample is 4,096 bytes
    finally:
        server.stop()


def test_the_values_of_a_field_lie_between_the_ends_that_are_told_whatever_order_they_come_in():
    values = [0.5, 3, float("nan"), float("inf"), 10**400, True, "b", "a" * 60, None, [1], {"x": 1}, -2]
    for order in (values, values[::-1], [*values[6:], *values[:6]]):
        parts = [JsonField(), JsonField()]
        for number, value in enumerate(order):
            parts[number % 2].add(value)
        parts[0].merge(parts[1])
        assert parts[0] == JsonField(12, [-2.0, 3.0], ["a" * 40, "true"])
    assert JsonField(2, [1.0, 1.0], ["en", "zh"]).range == "1, en to zh"
    assert JsonField(2).range == ""


def test_a_field_whose_name_is_half_a_character_can_be_told(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [member(0) | {"json": b'{"\\ud800": "\\udfff"}'}])
    assert main(["stats", str(tmp_path), "-o", str(tmp_path / "s.json"), "--processes", "1"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["json_fields"]["\ud800"]["share"] == 1
