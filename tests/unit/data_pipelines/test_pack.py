"""Folders and tables become shards that webdataset reads back, and every row that does not is accounted for."""

import csv
import datetime
import io
import itertools
import json
import os
from dataclasses import replace
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from corpus import caption, jpeg
from PIL import Image

from data_pipelines.__main__ import main
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Sample
from data_pipelines.stream.reader import ShardReader, iter_captions
from data_pipelines.tools.pack import pack
from data_pipelines.tools.pairs import read_pairs

NUM_ROWS = 12
Record = dict[str, object]


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (9, 9)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for index in range(NUM_ROWS):
        name = f"deep/{index:02d}" if index % 2 else f"{index:02d}"
        (source / f"{name}.jpg").write_bytes(png() if index == 4 else jpeg(index))
        (source / f"{name}.txt").write_text(caption(index))
    return source


def records(source: Path) -> list[Record]:
    paths = sorted(source.rglob("*.jpg"), key=lambda path: path.name)
    return [
        {"file": os.path.relpath(path, source.parent), "text": caption(index), "score": index / 10}
        for index, path in enumerate(paths)
    ]


def write_table(path: Path, rows: list[Record]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def unpacked(out: Path) -> list[Record]:
    """What webdataset's own reader finds."""
    shards = [shard.location for shard in Manifest.load(out / "manifest.json").shards]
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    return [{name: value for name, value in sample.items() if not name.startswith("__")} for sample in dataset]


def test_a_folder_is_packed_with_its_bytes_as_they_are(folder: Path, tmp_path: Path):
    assert main(["pack", str(folder), str(tmp_path / "out"), "--samples-per-shard", "5"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00001.tar", "00002.tar"}
    assert [shard.samples for shard in Manifest.load(tmp_path / "out" / "manifest.json").shards] == [5, 5, 2]
    images = sorted(folder.rglob("*.jpg"))
    for path, sample in zip(images, unpacked(tmp_path / "out"), strict=True):
        extension = "png" if path.name == "04.jpg" else "jpg"
        assert sample[extension] == path.read_bytes()
        assert sample["txt"] == path.with_suffix(".txt").read_bytes()
        assert json.loads(str(sample["json"], "utf-8")) == {"file": path.relative_to(folder).as_posix()}  # pyright: ignore


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_is_packed_with_its_other_columns(suffix: str, folder: Path, tmp_path: Path):
    table = tmp_path / f"table{suffix}"
    write_table(table, records(folder))
    options = ["--image-column", "file", "--caption-column", "text"]
    assert main(["pack", str(table), str(tmp_path / "out"), *options]) == 0
    found = unpacked(tmp_path / "out")
    assert [str(sample["txt"], "utf-8") for sample in found] == [caption(i) for i in range(NUM_ROWS)]  # pyright: ignore
    scores = [json.loads(sample["json"])["score"] for sample in found]  # pyright: ignore
    assert [float(score) for score in scores] == [index / 10 for index in range(NUM_ROWS)]
    assert all(set(json.loads(sample["json"])) == {"score"} for sample in found)  # pyright: ignore


def rejected(out: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["row"]: row["reason"] for row in rows}


def encoded(image_format: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, image_format)
    return out.getvalue()


def texts(out: Path) -> list[str]:
    return [str(sample["txt"], "utf-8") for sample in unpacked(out)]  # pyright: ignore


def metadata(out: Path) -> list[Record]:
    return [json.loads(sample["json"]) for sample in unpacked(out)]  # pyright: ignore


def trained_on(out: Path) -> list[str]:
    """Captions as training reads them."""
    return list(iter_captions(Manifest.load(out / "manifest.json")))


# --- Tables


def test_bad_rows_are_listed_with_row_and_reason_and_summed_up(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    rows = records(folder)
    (folder / "00.jpg").write_bytes(b"no image")
    rows[1]["file"] = "source/nowhere.jpg"
    rows[2]["text"] = "  "
    rows[3]["file"] = ""
    rows[4]["file"] = "source"
    rows[5]["file"] = "https://example.org/a.jpg"
    (folder / "06.jpg").write_bytes(jpeg(6)[:300])
    (folder / "deep" / "07.jpg").write_bytes(b"")
    write_table(tmp_path / "t.csv", rows)
    options = ["--image-column", "file", "--caption-column", "text"]
    assert main(["pack", str(tmp_path / "t.csv"), str(tmp_path / "out"), *options]) == 0
    assert {row: reason.partition(" (")[0] for row, reason in rejected(tmp_path / "out").items()} == {
        1: "image cannot be decoded: it is no JPEG, PNG or WebP",
        2: "image cannot be read: No such file or directory",
        3: "caption is empty",
        4: "no image is named",
        5: "image cannot be read: it is no file",
        6: "image is a URL: bring it here first, as img2dataset does, and give its path",
        7: "image cannot be decoded: it is cut short",
        8: "image cannot be decoded: it is empty",
    }
    out, error = capfd.readouterr()
    assert "4 samples in 1 shard\n" in out
    assert "rejected.jsonl" in error
    assert len(unpacked(tmp_path / "out")) == NUM_ROWS - 8


def test_a_path_in_the_list_of_rejected_rows_is_cut(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    write_table(tmp_path / "t.jsonl", [{"image": "a.jpg", "caption": "x"}, {"image": "b" * 100_000, "caption": "x"}])
    assert main(["pack", str(tmp_path / "t.jsonl"), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == {2: "image cannot be read: File name too long"}
    assert (tmp_path / "out" / "rejected.jsonl").stat().st_size < 400


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1.jpg,a dog, running", "line 3 has 3 fields, the header 2"),
        ("1.jpg", "line 3 has 1 field, the header 2"),
        ('1.jpg,"a sign', "line 3 cannot be read as CSV: unexpected end of data"),
    ],
)
def test_a_row_of_csv_that_does_not_fit_is_rejected_and_no_other(line: str, sentence: str, tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.csv").write_text(f"image,caption\na.jpg,one\n{line}\na.jpg,three\n")
    assert main(["pack", str(tmp_path / "t.csv"), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == {2: sentence}
    assert texts(tmp_path / "out") == ["one", "three"]


def test_lines_of_jsonl_that_cannot_be_rows_are_rejected_one_by_one(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    lines = (
        '{"image":',
        '{"image": "a.jpg", "caption": "good"}',
        '{"image": "a.jpg", "caption": "half \\ud83d"}',
        '{"image": "a.jpg", "caption": "good, too", "title": "half \\ud83d"}',
        '{"image": "a\\u0000.jpg", "caption": "x"}',
        '{"image": "\\ud83d.jpg", "caption": "x"}',
        '{"image": 7, "caption": "x"}',
        '{"caption": "x"}',
        '{"image": "a.jpg", "caption": "x", "deep": ' + "[" * 900 + "]" * 900 + "}",
    )
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert main(["pack", str(tmp_path / "t.jsonl"), str(tmp_path / "out")]) == 0
    found = rejected(tmp_path / "out")
    assert found.pop(9, "metadata cannot be written as JSON (RecursionError)").startswith("metadata cannot be written")
    assert found == {
        1: "line 1 is not a JSON object",
        3: "caption holds half a character, a lone surrogate",
        5: "image cannot be read: its path holds a null byte or half a character",
        6: "image cannot be read: its path holds a null byte or half a character",
        7: "image is neither a path nor bytes but of type int",
        8: "no image is named",
    }
    assert texts(tmp_path / "out")[:2] == ["good", "good, too"]
    assert metadata(tmp_path / "out")[1] == {"title": "half \ud83d"}


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        ("a dog", ["a dog"]),
        ("  a dog\n", ["a dog"]),
        ("\ufeffa dog", ["a dog"]),
        (["a dog", "ein Hund"], ["a dog", "ein Hund"]),
        (["a dog"], ["a dog"]),
        (["", " a dog ", " "], ["a dog"]),
        (b"a dog", ["a dog"]),
        ("a dog".encode("utf-16"), ["a dog"]),
        (None, "caption is missing"),
        ("", "caption is empty"),
        (" \n", "caption is empty"),
        ([], "caption is empty"),
        (["", " "], "caption is empty"),
        (5, "caption is not text but int"),
        (0.5, "caption is not text but float"),
        (float("nan"), "caption is not text but float"),
        ({"raw": "a dog"}, "caption is not text but dict"),
        ([{"raw": "a dog"}], "caption is not text but a list of dict"),
        ([1, 2], "caption is not text but a list of int"),
        ("a\0dog", "caption is not UTF-8 text: it holds null bytes, as UTF-16 does"),
        (b"caf\xe9", "caption is not UTF-8"),
        ("x" * 70_000, "caption of 70,000 bytes is longer than 65,536"),
    ],
)
def test_a_caption_is_what_training_will_read_or_its_row_is_rejected(cell: object, read: object, tmp_path: Path):
    good = {"image": jpeg(0), "caption": "good"}
    write = pyarrow.Table.from_arrays(
        [pyarrow.array([jpeg(0)]), pyarrow.array([cell], None if cell != [] else pyarrow.list_(pyarrow.string()))],
        names=["image", "caption"],
    )
    pyarrow.parquet.write_table(write, tmp_path / "t.parquet")
    code = main(["pack", str(tmp_path / "t.parquet"), str(tmp_path / "out")])
    if isinstance(read, list):
        assert code == 0
        (sample,) = ShardReader(Manifest.load(tmp_path / "out" / "manifest.json")).read_all([0], [0])
        assert isinstance(sample, Sample)
        assert list(sample.captions()) == read
        assert texts(tmp_path / "out") == [read[0]]
        return
    assert code == 4  # nothing else is in it
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good]), tmp_path / "good.parquet")
    pairs = read_pairs(tmp_path / "t.parquet", "image", "caption")
    rows = itertools.chain(pairs.rows(), read_pairs(tmp_path / "good.parquet", "image", "caption").rows())
    packed = pack(replace(pairs, rows=lambda: rows), tmp_path / "both", samples_per_shard=9)
    assert rejected(tmp_path / "both") == {1: read}
    assert packed.rejected == {"bad caption": 1}


@pytest.mark.parametrize("kind", ["bytes", "struct", "struct of a path", "path"])
def test_images_of_parquet_are_bytes_or_paths_or_hugging_faces_both(kind: str, tmp_path: Path):
    image = jpeg(0)
    (tmp_path / "a.jpg").write_bytes(image)
    cell = {
        "bytes": image,
        "struct": {"bytes": image, "path": "elsewhere.jpg"},
        "struct of a path": {"bytes": None, "path": "a.jpg"},
        "path": "a.jpg",
    }[kind]
    rows = [{"image": cell, "caption": "a dog"}, {"image": None, "caption": "a cat"}]
    if kind.startswith("struct"):
        rows.append({"image": {"bytes": None, "path": None}, "caption": "a cat"})
    if kind == "bytes":
        rows += [{"image": b"\xff" * 3_000_000, "caption": "x"}, {"image": encoded("GIF"), "caption": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert main(["pack", str(tmp_path / "t.parquet"), str(tmp_path / "out")]) == 0
    (sample,) = unpacked(tmp_path / "out")
    assert (sample["jpg"], sample["txt"]) == (image, b"a dog")
    assert [*rejected(tmp_path / "out").values()] == {
        "bytes": [
            "no image is named",
            "image cannot be decoded: it is no JPEG, PNG or WebP",
            "GIF is not supported: convert it to JPEG, PNG or WebP",
        ],
        "path": ["no image is named"],
    }.get(kind, ["no image is named"] * 2)
    assert (tmp_path / "out" / "rejected.jsonl").stat().st_size < 1000


def test_what_json_has_no_form_for_becomes_what_it_has(tmp_path: Path):
    row = {"nan": float("nan"), "inf": [float("inf")], "raw": b"\xff", "day": datetime.date(2024, 1, 2), "none": None}
    rows = [{"image": jpeg(0), "caption": "a dog", "money": Decimal("0.30"), **row}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert main(["pack", str(tmp_path / "t.parquet"), str(tmp_path / "out")]) == 0
    (sample,) = unpacked(tmp_path / "out")
    plain = {"nan": None, "inf": [None], "raw": "/w==", "day": "2024-01-02", "none": None, "money": "0.30"}
    assert json.loads(sample["json"], parse_constant=pytest.fail) == plain  # pyright: ignore


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_scores_of_every_kind_of_table_are_numbers_to_filters(suffix: str, folder: Path, tmp_path: Path):
    write_table(tmp_path / f"t{suffix}", records(folder))
    options = ["--image-column", "file", "--caption-column", "text"]
    assert main(["pack", str(tmp_path / f"t{suffix}"), str(tmp_path / "out"), *options]) == 0
    index = ["index", str(tmp_path / "out"), "-o", str(tmp_path / "f.json"), "--min-score", "score=0.85"]
    assert main(index) == 0
    assert Manifest.load(tmp_path / "f.json").samples == 3  # 0.9, 1.0, 1.1


@pytest.mark.parametrize("column", ["captions", "caption"])
@pytest.mark.parametrize("value", ["raw alt text", ["raw alt text", "IMG_1234.JPG"], []])
def test_a_column_that_is_named_as_captions_are_in_json_does_not_beat_the_column_asked_for(
    column: str, value: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    row = {"image": "a.jpg", "text": "a dog", column: value, f"{column}_column": 1}
    write_table(tmp_path / "t.jsonl", [row])
    assert main(["pack", str(tmp_path / "t.jsonl"), str(tmp_path / "out"), "--caption-column", "text"]) == 0
    assert trained_on(tmp_path / "out") == ["a dog"]
    assert metadata(tmp_path / "out") == [{f"{column}_column_column": value, f"{column}_column": 1}]
    said = f"The column {column!r} is '{column}_column_column' in each sample's json, where {column!r} is what training"
    assert said in capfd.readouterr().out


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_is_answered_with_those_there_are(
    suffix: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table = tmp_path / f"t{suffix}"
    write_table(table, records(folder))
    assert main(["pack", str(table), str(tmp_path / "out"), "--image-column", "fil"]) == 4
    error = capfd.readouterr().err
    assert "no column 'fil', only 'file', 'text', 'score'; the nearest is 'file': name it with --image-column" in error
    assert main(["pack", str(table), str(tmp_path / "out"), "--image-column", "file"]) == 4
    assert "no column 'caption', only 'file', 'text', 'score': name it with --caption" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "header", "told"),
    [
        ("t.csv", "image;caption", "'image;caption' (separate columns by commas, not ';')"),
        ("t.csv", "image\tcaption", "'image\\tcaption' (separate columns by commas, not '\\t')"),
        ("t.tsv", "image,caption", "'image,caption' (separate columns by tabs, not ',')"),
        ("t.csv", ",".join(f"c{number}" for number in range(1000)), f"{str([f'c{n}' for n in range(99)])[1:201]}..."),
    ],
)
def test_a_table_of_another_separator_or_of_many_columns_is_told_in_short(
    name: str, header: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_text(f"{header}\n")
    assert main(["pack", str(tmp_path / name), str(tmp_path / "out")]) == 4
    assert f"has no column 'image', only {told}: name it with --image-column." in capfd.readouterr().err


# --- Folders


@pytest.mark.parametrize(
    ("name", "caption", "encoding", "reason"),
    [
        *((code, "a cat, 一只猫", code, "") for code in ("utf-8", "utf-8-sig", "utf-16")),
        ("gbk", "一只猫坐在沙发上", "gbk", "caption is not UTF-8"),
        ("cp1252", "the artist\u2019s café", "cp1252", "caption is not UTF-8"),
        ("latin-1", "café", "latin-1", "caption is not UTF-8"),
        ("utf-16-le", "a cat", "utf-16-le", "caption is not UTF-8 text: it holds null bytes, as UTF-16 does"),
        ("empty", "", "utf-8", "caption is empty"),
        ("blank", " \n", "utf-8", "caption is empty"),
        ("long", "x" * 70_000, "utf-8", "caption of 70,000 bytes is longer than 65,536"),
    ],
)
def test_a_caption_beside_an_image_is_text_or_is_rejected(
    name: str, caption: str, encoding: str, reason: str, folder: Path, tmp_path: Path
):
    (folder / "00.txt").write_bytes(caption.encode(encoding))
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == ({1: reason} if reason else {})
    assert texts(tmp_path / "out")[:1] == [caption if not reason else texts(tmp_path / "out")[0]]
    assert len(trained_on(tmp_path / "out")) == NUM_ROWS - bool(reason)


def test_whatever_looks_like_an_image_is_packed_by_its_bytes_or_listed_and_hidden_files_are_passed_over(
    folder: Path, tmp_path: Path
):
    for path in sorted(folder.rglob("*.*"))[2:]:
        path.unlink()
    for name in ("b.jfif", "c.JPG", "d", "e.dat", "f.png"):  # JPEG all of them
        (folder / name).write_bytes(jpeg(1))
        (folder / Path(name).with_suffix(".TXT" if name == "c.JPG" else ".txt")).write_text(name)
    formats = {
        "g.gif": "GIF",
        "h.bmp": "BMP",
        "i.tif": "TIFF",
        "j.avif": "AVIF",
        "k.jpg": "GIF",
        "l": "BMP",
        "m": "ICO",
    }
    others = ("n1.tga", "n2.PPM", "n3.dng", "n4.exr")
    for name, kind in formats.items():
        (folder / name).write_bytes(encoded(kind))
    (folder / "n.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (folder / "o.webp").write_bytes(b"<html>404</html>")
    for name in others:
        (folder / name).write_bytes(b"of a format that its bytes do not tell")
    (folder / "p.md").write_bytes(b"BMW builds cars, and RIFF is a format")
    (folder / "q.jpg").symlink_to("nowhere.jpg")
    (folder / "r.jpg").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".s.jpg", ".ipynb_checkpoints/t.jpg"):
        (folder / name).write_bytes(jpeg(1))
        (folder / name).with_suffix(".txt").write_text("a left-over copy")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "u.jpg").write_bytes(jpeg(2))
    (elsewhere / "u.txt").write_text("in a linked folder")
    (elsewhere / "back").symlink_to(folder)
    (folder / "v").symlink_to(elsewhere)
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    packed = {
        str(record["file"]): text
        for record, text in zip(metadata(tmp_path / "out"), texts(tmp_path / "out"), strict=True)
    }
    first = next(name for name in packed if name.startswith(("0", "deep")))
    assert packed == {name: name for name in ("b.jfif", "c.JPG", "d", "e.dat", "f.png")} | {
        first: caption(0),
        "v/u.jpg": "in a linked folder",
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {Path(line["image"]).relative_to(folder).as_posix(): line["reason"] for line in lines} == {
        **{name: f"{kind} is not supported: convert it to JPEG, PNG or WebP" for name, kind in formats.items()},
        "n.heic": "HEIC is not supported: convert it to JPEG, PNG or WebP",
        "o.webp": "image cannot be decoded: it is HTML or XML",
        **dict.fromkeys(others, "image cannot be decoded: it is no JPEG, PNG or WebP"),
        "q.jpg": "image cannot be read: No such file or directory",
        "v/back": "folder was read before, by a link",
    }


def test_an_image_without_a_caption_beside_it_is_listed(folder: Path, tmp_path: Path):
    (folder / "02.txt").unlink()
    (folder / "04.txt").unlink()
    (folder / "04.txt").mkdir()
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == {2: "caption is missing", 3: "caption is missing"}


def test_a_file_whose_name_is_no_text_is_packed(folder: Path, tmp_path: Path):
    name = os.fsdecode(b"caf\xe9")
    (folder / f"{name}.jpg").write_bytes(jpeg(0))
    (folder / f"{name}.txt").write_text("coffee")
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert {"file": "caf\\xe9.jpg"} in metadata(tmp_path / "out")


def test_a_multi_picture_jpeg_of_a_phone_is_packed_as_jpg(tmp_path: Path):
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in" / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "in" / "a.txt").write_text("red")
    with Image.open(tmp_path / "in" / "a.jpg") as image:
        assert image.format == "MPO"
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert unpacked(tmp_path / "out")[0]["jpg"] == (tmp_path / "in" / "a.jpg").read_bytes()


# --- Sources and targets


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "nowhere does not exist: give a folder of images, or a table (.csv, .tsv, .jsonl, .parquet)."),
        ("nowhere.csv", "nowhere.csv does not exist: give a folder of images, or a table (.csv, .tsv"),
        ("note.docx", "note.docx is neither a folder of images nor a table: give one (.csv, .tsv, .jsonl, .parquet)."),
        ("empty", "empty holds no images: give a folder of images with captions (.txt) beside them."),
        ("silent", "silent holds no captions (.txt) beside its 2 images: write a.txt beside a.jpg, or give a table"),
        ("header.csv", "Nothing in {}header.csv could be packed (it has no rows): mend the rows."),
        ("bad.csv", "(1 x bad row, 1 x missing image; the first is row 1, line 2 has 1 field, the header 2): mend"),
        ("broken.parquet", "broken.parquet cannot be read as parquet ("),
    ],
)
def test_of_a_source_that_cannot_be_packed_one_sentence_is_said_and_nothing_written(
    name: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "note.docx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent" / "deep").mkdir(parents=True)
    for image in ("a.jpg", "deep/b.png"):
        (tmp_path / "silent" / image).write_bytes(jpeg(0))
    (tmp_path / "header.csv").write_text("image,caption\n")
    (tmp_path / "bad.csv").write_text("image,caption\na.jpg\nnowhere.jpg,b\n")
    rows = [{"image": jpeg(number), "caption": str(number)} for number in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "broken.parquet", row_group_size=280)
    column = pyarrow.parquet.read_metadata(tmp_path / "broken.parquet").row_group(1).column(0)
    with (tmp_path / "broken.parquet").open("r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * 60)
    for out in ("out", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert main(["pack", str(tmp_path / name), str(tmp_path / out), "--samples-per-shard", "5"]) == 4
        said = capfd.readouterr().err.splitlines()[-1]
        assert sentence.format(f"{tmp_path}/") in said
    assert not (tmp_path / "out").exists()
    assert not [*(tmp_path / "there").iterdir()]


def test_a_folder_that_is_not_empty_is_not_written_to(folder: Path, capfd: pytest.CaptureFixture[str]):
    before = sorted(folder.rglob("*"))
    assert main(["pack", str(folder), str(folder)]) == 4
    assert "is not empty: name a new folder" in capfd.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_what_a_killed_run_left_is_no_hindrance(folder: Path, tmp_path: Path):
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    (tmp_path / "out" / ".unfinished" / "00007.tar").write_bytes(b"half a shard")
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"00000.tar", "manifest.json", "manifest.index", "rejected.jsonl"}


def test_the_checksums_of_what_was_packed_are_kept(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "00000.tar"
    assert Manifest.load(tmp_path / "out" / "manifest.json").shards[0].sha256 == sha256(shard.read_bytes()).hexdigest()


# --- What is held out


def label_table(tmp_path: Path, count: int) -> Path:
    """Rows of which each image comes twice, the second time under another name."""
    rows: list[Record] = []
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number // 2))
        rows.append({"image": f"{number}.jpg", "caption": f"number {number}", "captions": "x", "kind": number % 3})
    rows[0]["kind"], rows[1]["kind"] = None, " "
    write_table(tmp_path / "t.jsonl", rows)
    return tmp_path / "t.jsonl"


def held_out(out: Path) -> tuple[list[Record], list[Record]]:
    return unpacked(out / "train"), unpacked(out / "heldout")


def test_as_many_samples_as_asked_for_are_held_out_and_no_image_is_on_both_sides(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table = label_table(tmp_path, 40)
    options = ["--heldout", "10", "--label-column", "kind", "--samples-per-shard", "8"]
    assert main(["pack", str(table), str(tmp_path / "out"), *options]) == 0
    train, heldout = held_out(tmp_path / "out")
    assert (len(train), len(heldout)) == (30, 10)
    assert not {sample["jpg"] for sample in train} & {sample["jpg"] for sample in heldout}
    assert len({sample["txt"] for sample in train + heldout}) == 40
    said = capfd.readouterr().out
    assert "out/train/manifest.json: 30 samples in 4 shards" in said
    assert "out/heldout/manifest.json: 10 samples in 2 shards" in said
    prompts = json.loads((tmp_path / "out" / "heldout" / "prompts.json").read_text())
    assert prompts == {"field": "kind", "classes": {str(kind): [f"a photo of a {kind}"] for kind in range(3)}}


def test_which_samples_are_held_out_does_not_depend_on_their_order(tmp_path: Path):
    table = label_table(tmp_path, 40)
    lines = table.read_text().splitlines()
    (tmp_path / "back.jsonl").write_text("\n".join(reversed(lines)))
    both: list[set[object]] = []
    for source in ("t.jsonl", "back.jsonl"):
        assert main(["pack", str(tmp_path / source), str(tmp_path / source[:-6]), "--heldout", "9"]) == 0
        both.append({sample["txt"] for sample in held_out(tmp_path / source[:-6])[1]})
    assert both[0] == both[1]
    assert len(both[0]) == 8  # nine would tear two equal images apart


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--heldout", "6"], "has 6 good samples, too few to train on others: hold out fewer."),
        (["--heldout", "1"], "repeats one image more often than samples are held out: hold out more."),
        (["--label-column", "kind"], "--label-column makes prompts.json for held-out samples: add --heldout, or leave"),
        (
            ["--heldout", "2", "--label-column", "sort"],
            "has no label column 'sort'; its other columns are 'captions', '",
        ),
    ],
)
def test_what_cannot_be_held_out_is_refused_and_nothing_written(
    options: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(["pack", str(label_table(tmp_path, 6)), str(tmp_path / "out"), *options]) == 4
    assert sentence in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
