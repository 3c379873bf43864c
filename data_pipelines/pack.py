"""Packs a folder or a table of images and captions into shards."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

from data_pipelines.decode import check_image
from data_pipelines.errors import DataError, SampleError
from data_pipelines.index import IMAGE_EXTENSIONS, build_manifest
from data_pipelines.manifest import Manifest
from data_pipelines.reader import Sample
from data_pipelines.shards import write_shard

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Row:
    """One pair of the source, before anything is known of its image."""

    number: int  # from 1, as the source counts
    image: Path
    caption: str
    metadata: dict[str, object]


@dataclass
class Packed:
    """What came of a source."""

    manifest: Manifest
    good: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows by reason


def pack(
    source: Path,
    folder: Path,
    *,
    image_column: str,
    caption_column: str,
    samples_per_shard: int,
    on_row: Callable[[], None] = lambda: None,
) -> Packed:
    """Writes the shards of a source, their manifest and `rejected.jsonl`.

    Image bytes go in as they are, once they have been decoded to see that they can be. The other columns go into
    each sample's json.

    Args:
        source: A folder of images each with a .txt of the same name, or a .csv, .tsv, .jsonl or .parquet of paths,
            absolute or relative to the table, and captions.
        folder: New or empty.
        image_column: Of a table.
        caption_column: Of a table.
        samples_per_shard: The last shard may have fewer.
        on_row: Called as each row is done.

    Raises:
        DataError: The source cannot be read, the folder is not empty, or no row is good.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: name a new folder, or empty this one.")
    rows = iter_rows(source, image_column, caption_column)
    folder.mkdir(parents=True, exist_ok=True)
    rejected: Counter[str] = Counter()
    shards: list[Path] = []
    good = 0
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as report, ThreadPoolExecutor() as pool:

        def samples() -> Iterator[dict[str, bytes | str]]:
            # Threads, since decoding releases the interpreter; in chunks, so that memory stays small.
            while chunk := list(islice(rows, 256)):
                for row, outcome in zip(chunk, pool.map(_sample, chunk), strict=True):
                    on_row()
                    if isinstance(outcome, dict):
                        yield outcome
                        continue
                    kind, detail = outcome
                    rejected[kind] += 1
                    line = {"row": row.number, "image": str(row.image), "reason": detail}
                    report.write(json.dumps(line, ensure_ascii=False) + "\n")

        stream = samples()
        while batch := list(islice(stream, samples_per_shard)):
            shards.append(folder / f"{len(shards):05d}.tar")
            write_shard(shards[-1], batch)
            good += len(batch)
    if not shards:
        reasons = ", ".join(f"{count} x {kind}" for kind, count in rejected.most_common()) or "it has no rows"
        raise DataError(f"Nothing in {source} could be packed ({reasons}): see {folder / 'rejected.jsonl'}.")
    manifest, _ = build_manifest(shards, folder / "manifest.json")
    manifest.save(folder / "manifest.json")
    return Packed(manifest, good, rejected)


def iter_rows(source: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The pairs of a folder or a table, in its order.

    Raises:
        DataError: There is no such source, it is of no known kind, or a column is missing.
    """
    readers = {".csv": _csv_records, ".tsv": _csv_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    if source.is_dir():
        return _folder_rows(source)
    if not source.is_file() or source.suffix.lower() not in readers:
        raise DataError(
            f"{source} is no folder of images and no {', '.join(readers)} file: give one of these as the source."
        )
    columns, records = readers[source.suffix.lower()](source)
    for option, name in (("--image-column", image_column), ("--caption-column", caption_column)):
        if name not in columns:
            nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise DataError(
                f"{source} has no column {name!r}, only {', '.join(map(repr, columns))}{hint}: name it with {option}."
            )
    return _table_rows(source.parent, records, image_column, caption_column)


def _table_rows(
    folder: Path, records: Iterator[dict[str, object]], image_column: str, caption_column: str
) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        image = str(record.pop(image_column, None) or "")
        caption = record.pop(caption_column, None)
        yield Row(number, folder / image, caption if isinstance(caption, str) else "", record)


def _folder_rows(folder: Path) -> Iterator[Row]:
    extensions = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)
    for number, image in enumerate(images, 1):
        text = image.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
        yield Row(number, image, caption, {"file": image.relative_to(folder).as_posix()})


def _csv_records(path: Path) -> tuple[list[str], Iterator[dict[str, object]]]:
    def records() -> Iterator[dict[str, object]]:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for record in csv.DictReader(file, delimiter=delimiter):
                yield {name: value for name, value in record.items() if name is not None}

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file, delimiter=delimiter), [])
    return columns, records()


def _jsonl_records(path: Path) -> tuple[list[str], Iterator[dict[str, object]]]:
    def records() -> Iterator[dict[str, object]]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise DataError(f"Line {number} of {path} is not a JSON object: mend or remove it.")
                yield record

    return list(next(records(), {})), records()


def _parquet_records(path: Path) -> tuple[list[str], Iterator[dict[str, object]]]:
    try:
        from pyarrow import parquet  # an optional dependency
    except ImportError:
        raise DataError(f"Reading {path} needs pyarrow: `pip install pyarrow`.") from None
    file = parquet.ParquetFile(path)
    records = (record for batch in file.iter_batches(1024) for record in batch.to_pylist())
    return file.schema_arrow.names, records


def _sample(row: Row) -> dict[str, bytes | str] | tuple[str, str]:
    """The row's members by extension, or why it is rejected: (kind, detail)."""
    try:
        data = row.image.read_bytes()
    except OSError as error:
        return "missing image", f"image cannot be read: {error.strerror}"
    try:
        text = Sample("", "", data, row.caption.encode(), None).caption()
        check_image(data)
    except SampleError as error:
        kind = "bad caption" if str(error).startswith("caption") else "bad image"
        return kind, str(error)
    with Image.open(io.BytesIO(data)) as image:
        extension = _EXTENSION[str(image.format)]
    metadata = json.dumps(row.metadata, ensure_ascii=False, default=str)
    return {"__key__": f"{row.number:09d}", extension: data, "txt": text.encode(), "json": metadata.encode()}
