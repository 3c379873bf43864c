"""Packs a folder or a table of images and captions into shards."""

from __future__ import annotations

import csv
import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_pipelines.decode import check_image
from data_pipelines.errors import DataError, SampleError, cannot_open
from data_pipelines.header import read_header
from data_pipelines.index import build_manifest
from data_pipelines.manifest import Manifest
from data_pipelines.sample import IMAGE_EXTENSIONS, Sample
from data_pipelines.shards import write_shard

_Records = Iterator[dict[str, object] | SampleError]  # an error in the place of a row that is none


@dataclass(frozen=True)
class Row:
    """One pair of the source, before anything is known of its image."""

    number: int  # from 1, as the source counts
    image: Path
    caption: str
    metadata: dict[str, object]
    fault: str | None = None  # why the source has no pair here


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
        DataError: The source cannot be read, the folder is not empty, or no row is good. A bad row is none: it is
            listed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: name a new folder, or empty this one.")
    rows = iter_rows(source, image_column, caption_column)
    folder.mkdir(parents=True, exist_ok=True)
    rejected: Counter[str] = Counter()
    shards: list[Path] = []
    good = 0
    # A lone surrogate in a path is written as JSON escapes it.
    listing = (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
    with listing as report, ThreadPoolExecutor() as pool:

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
                    line = {"row": row.number, "image": "" if row.fault else str(row.image), "reason": detail}
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
    manifest.save()
    return Packed(manifest, good, rejected)


def iter_rows(source: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The pairs of a folder or a table, in its order.

    Raises:
        DataError: There is no such source, it is of no known kind or cannot be read, or a column is missing.
    """
    readers = {".csv": _csv_records, ".tsv": _csv_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    if source.is_dir():
        return _folder_rows(source)
    if not source.is_file() or source.suffix.lower() not in readers:
        raise DataError(
            f"{source} is no folder of images and no {', '.join(readers)} file: give one of these as the source."
        )
    if source.suffix.lower() != ".parquet":
        _check_text(source)
    columns, records = readers[source.suffix.lower()](source)
    if not columns:
        raise DataError(f"{source} is empty: give a table whose first line names its columns.")
    for option, name in (("--image-column", image_column), ("--caption-column", caption_column)):
        if name not in columns:
            nearest = difflib.get_close_matches(name, columns, n=1, cutoff=0)
            others = (
                f"only {', '.join(map(repr, columns))}; the nearest is {nearest[0]!r}" if nearest else "nor any other"
            )
            raise DataError(f"{source} has no column {name!r}, {others}: name it with {option}.")
    return _table_rows(source.parent, records, image_column, caption_column)


def _check_text(source: Path) -> None:
    # Before the first shard is written, since a table is small beside its images.
    try:
        with source.open(encoding="utf-8") as file:
            for _ in file:
                pass
    except UnicodeDecodeError:
        raise DataError(f"{source} is not UTF-8: convert it, as with `iconv -f WINDOWS-1252 -t UTF-8`.") from None
    except OSError as error:
        raise cannot_open(str(source), error) from None


def _table_rows(folder: Path, records: _Records, image_column: str, caption_column: str) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        if isinstance(record, SampleError):
            yield Row(number, folder, "", {}, str(record))
            continue
        image = str(record.pop(image_column, None) or "")
        caption = record.pop(caption_column, None)
        yield Row(number, folder / image, caption if isinstance(caption, str) else "", record)


def _folder_rows(folder: Path) -> Iterator[Row]:
    extensions = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)
    for number, image in enumerate(images, 1):
        text = image.with_suffix(".txt")
        caption, fault = "", None
        try:
            caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
        except OSError as error:
            fault = f"{text} cannot be read: {error.strerror}"
        yield Row(number, image, caption, {"file": image.relative_to(folder).as_posix()}, fault)


def _csv_records(path: Path) -> tuple[list[str], _Records]:
    def records() -> _Records:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            while True:
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield SampleError(f"line {reader.reader.line_num} cannot be read: {error}")
                    continue
                yield {name: value for name, value in record.items() if name is not None}

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file, delimiter=delimiter), [])
    return columns, records()


def _jsonl_records(path: Path) -> tuple[list[str], _Records]:
    def records() -> _Records:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                yield record if isinstance(record, dict) else SampleError(f"line {number} is not a JSON object")

    first = next((record for record in records() if isinstance(record, dict)), None)
    if first is None:
        raise DataError(f"No line of {path} is a JSON object: give one object of columns a line.")
    return list(first), records()


def _parquet_records(path: Path) -> tuple[list[str], _Records]:
    try:
        from pyarrow import ArrowException, parquet  # an optional dependency
    except ImportError:
        raise DataError(f"Reading {path} needs pyarrow: `pip install pyarrow`.") from None
    broken = (ArrowException, OSError, ValueError)
    sentence = f"{path} cannot be read as parquet (%s): write it again, or give the table as .csv or .jsonl."

    def records() -> _Records:
        try:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        except broken as error:
            raise DataError(sentence % type(error).__name__) from None

    try:
        file = parquet.ParquetFile(path)
    except broken as error:
        raise DataError(sentence % type(error).__name__) from None
    return file.schema_arrow.names, records()


def _sample(row: Row) -> dict[str, bytes | str] | tuple[str, str]:
    """The row's members by extension, or why it is rejected: (kind, detail)."""
    if row.fault:
        return "bad row", row.fault
    try:
        data = row.image.read_bytes()
    except OSError as error:
        return "missing image", f"image cannot be read: {error.strerror}"
    except ValueError:
        return "missing image", "image cannot be read: its path holds a null byte or half a character"
    try:
        text = Sample("", "", {"txt": row.caption.encode()}).caption()
        check_image(data)
    except SampleError as error:
        kind = "bad caption" if str(error).startswith("caption") else "bad image"
        return kind, str(error)
    except UnicodeEncodeError:
        return "bad caption", "caption holds half a character, a lone surrogate"
    try:
        metadata = json.dumps(row.metadata, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "bad metadata", "metadata holds half a character, a lone surrogate"
    except (TypeError, ValueError, RecursionError) as error:
        return "bad metadata", f"metadata cannot be written as JSON ({type(error).__name__})"
    return {"__key__": f"{row.number:09d}", read_header(data).extension: data, "txt": text.encode(), "json": metadata}
