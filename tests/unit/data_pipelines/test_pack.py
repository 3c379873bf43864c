"""Folders and tables become shards that webdataset reads back, and every row that does not is accounted for."""

import csv
import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from corpus import caption, jpeg
from PIL import Image

from data_pipelines.__main__ import main
from data_pipelines.manifest import Manifest

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


def test_bad_rows_are_listed_with_row_and_reason_and_summed_up(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    rows = records(folder)
    (folder / "00.jpg").write_bytes(b"no image")
    rows[1]["file"] = "source/nowhere.jpg"
    rows[2]["text"] = "  "
    rows[3]["file"] = ""
    write_table(tmp_path / "t.csv", rows)
    options = ["--image-column", "file", "--caption-column", "text"]
    assert main(["pack", str(tmp_path / "t.csv"), str(tmp_path / "out"), *options]) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["row"]: row["reason"].partition(" (")[0] for row in rejected} == {
        1: "image cannot be decoded: it is no JPEG, PNG or WebP",
        2: "image cannot be read: No such file or directory",
        3: "caption is empty",
        4: "image cannot be read: Is a directory",
    }
    out, error = capfd.readouterr()
    assert "8 samples in 1 shards" in out
    assert "rejected.jsonl" in error
    assert len(unpacked(tmp_path / "out")) == NUM_ROWS - 4


def test_a_source_without_a_good_row_fails_and_says_why(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for text in folder.rglob("*.txt"):
        text.unlink()
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 4
    assert "Nothing in" in (error := capfd.readouterr().err)
    assert "12 x bad caption" in error
    assert "rejected.jsonl" in error


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_is_answered_with_those_there_are(
    suffix: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table = tmp_path / f"t{suffix}"
    write_table(table, records(folder))
    assert main(["pack", str(table), str(tmp_path / "out"), "--image-column", "fil"]) == 4
    error = capfd.readouterr().err
    assert "no column 'fil', only 'file', 'text', 'score'; the nearest is 'file': name it with --image-column" in error


def test_a_folder_that_is_not_empty_is_not_written_to(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["pack", str(folder), str(folder)]) == 4
    assert "is not empty: name a new folder" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "note.docx"])
def test_an_unknown_source_is_answered_with_the_known_ones(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "note.docx").write_bytes(b"")
    assert main(["pack", str(tmp_path / name), str(tmp_path / "out")]) == 4
    assert "no folder of images and no .csv, .tsv, .jsonl, .parquet file" in capfd.readouterr().err


def rejected(out: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["row"]: row["reason"] for row in rows}


def test_a_multi_picture_jpeg_of_a_phone_is_packed_as_jpg(tmp_path: Path):
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "in" / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    (tmp_path / "in" / "a.txt").write_text("red")
    with Image.open(tmp_path / "in" / "a.jpg") as image:
        assert image.format == "MPO"
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert unpacked(tmp_path / "out")[0]["jpg"] == (tmp_path / "in" / "a.jpg").read_bytes()


def test_lines_of_jsonl_that_cannot_be_rows_are_rejected_one_by_one(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    lines = (
        '{"image":',
        "[1]",
        '{"image": "a.jpg", "caption": "good"}',
        '{"image": "a.jpg", "caption": "half \\ud83d"}',
        '{"image": "a.jpg", "caption": "x", "title": "half \\ud83d"}',
        '{"image": "a\\u0000.jpg", "caption": "x"}',
        '{"image": "\\ud83d.jpg", "caption": "x"}',
        "[" * 200_000,
    )
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert main(["pack", str(tmp_path / "t.jsonl"), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == {
        1: "line 1 is not a JSON object",
        2: "line 2 is not a JSON object",
        4: "caption holds half a character, a lone surrogate",
        5: "metadata holds half a character, a lone surrogate",
        6: "image cannot be read: its path holds a null byte or half a character",
        7: "image cannot be read: its path holds a null byte or half a character",
        8: "line 8 is not a JSON object",
    }
    assert [sample["txt"] for sample in unpacked(tmp_path / "out")] == [b"good"]


def test_a_row_of_csv_that_cannot_be_read_is_rejected_with_its_line(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.csv").write_text(f"image,caption\na.jpg,{'x' * 200_000}\na.jpg,good\n")
    assert main(["pack", str(tmp_path / "t.csv"), str(tmp_path / "out")]) == 0
    assert rejected(tmp_path / "out") == {1: "line 2 cannot be read: field larger than field limit (131072)"}
    assert [sample["txt"] for sample in unpacked(tmp_path / "out")] == [b"good"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"image,caption\na.jpg,caf\xe9\n", "is not UTF-8: convert it, as with `iconv"),
        ("t.jsonl", b'{"image": "a", "caption": "caf\xe9"}\n', "is not UTF-8: convert it, as with `iconv"),
        ("t.jsonl", b"{\n[]\n", "is a JSON object: give one object of columns a line."),
        ("t.csv", b"", "is empty: give a table whose first line names its columns."),
        ("t.parquet", b"PAR1 and no more", "cannot be read as parquet (ArrowInvalid): write it again"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_the_fix_and_nothing_is_written(
    name: str, content: bytes, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_bytes(content)
    assert main(["pack", str(tmp_path / name), str(tmp_path / "out")]) == 4
    assert f"{tmp_path / name} {sentence}" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_breaks_off_within_is_named_with_the_fix(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table = tmp_path / "t.parquet"
    write_table(table, records(folder))
    content = bytearray(table.read_bytes())
    content[4:60] = b"\xff" * 56
    table.write_bytes(content)
    options = ["--image-column", "file", "--caption-column", "text"]
    assert main(["pack", str(table), str(tmp_path / "out"), *options]) == 4
    assert f"{table} cannot be read as parquet (" in capfd.readouterr().err
