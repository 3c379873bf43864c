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
    shards = [str(shard.path) for shard in Manifest.load(out / "manifest.json").shards]
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
        1: "image cannot be decoded",
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


def test_a_broken_line_of_jsonl_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "t.jsonl").write_text('{"image": "a", "caption": "b"}\n{"image":\n')
    assert main(["pack", str(tmp_path / "t.jsonl"), str(tmp_path / "out")]) == 4
    assert "Line 2 of" in capfd.readouterr().err
