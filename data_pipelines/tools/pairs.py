"""The pairs of a folder or a table, before anything is known of their images: what is none comes with its reason."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.errors import DataError, SampleError, cannot_open
from data_pipelines.shards.header import image_format
from data_pipelines.text import counted, cut
from data_pipelines.tools.tables import READERS, Record, read_table

# Files of these names that are no images are listed; any other file is an image where its bytes say so.
_IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jxl", ".jp2", ".j2k", ".ico", ".psd", ".svg", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".dds", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
}
_OURS = ("captions", "caption")  # fields of a sample's json that mean what training reads
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True)
class Row:
    """One pair of a source."""

    number: int  # from 1, as the source counts
    image: Path | bytes
    caption: object  # a text, texts, or a file of one
    metadata: Record
    fault: str = ""  # why the source has no pair here


@dataclass(frozen=True)
class Pairs:
    """What a source holds."""

    source: Path
    total: int
    rows: Callable[[], Iterator[Row]]
    fields: dict[str, str] = field(default_factory=dict)  # by column: what the samples' json calls it


def read_pairs(source: Path, image_column: str, caption_column: str) -> Pairs:
    """Opens a folder of images each with a .txt of the same name, or a table.

    Raises:
        DataError: There is no such source, it is of no known kind or cannot be read, or a column is missing.
    """
    if source.is_dir():
        return _folder_pairs(source)
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder of images, or a table ({', '.join(READERS)}).")
    if source.suffix.lower() not in READERS:
        raise DataError(f"{source} is neither a folder of images nor a table: give one ({', '.join(READERS)}).")
    return _table_pairs(source, image_column, caption_column)


def _table_pairs(source: Path, image_column: str, caption_column: str) -> Pairs:
    table = read_table(source)
    for option, name in (("--image-column", image_column), ("--caption-column", caption_column)):
        if name not in table.columns:
            raise DataError(
                f"{source} has no column {name!r}, only {_told(name, table.columns)}: name it with {option}."
            )
    fields = {name: _field(name, table.columns) for name in table.columns if name not in (image_column, caption_column)}

    def rows() -> Iterator[Row]:
        for number, record in enumerate(table.records(), 1):
            try:
                if isinstance(record, SampleError):
                    raise record
                image = _image(record.get(image_column), source.parent)
            except SampleError as error:
                yield Row(number, b"", None, {}, str(error))
                continue
            metadata = {fields[name]: value for name, value in record.items() if name in fields}
            yield Row(number, image, record.get(caption_column), metadata)

    return Pairs(source, table.num_rows, rows, fields)


def _told(name: str, columns: list[str]) -> str:
    told = cut(", ".join(map(repr, columns)))
    if len(columns) == 1 and (separator := next((c for c in ";\t|," if c in columns[0]), "")):
        return f"{told} (separate columns by {'tabs' if separator == ',' else 'commas'}, not {separator!r})"
    nearest = difflib.get_close_matches(name, columns, n=1)
    return f"{told}; the nearest is {nearest[0]!r}" if nearest else told


def _field(column: str, columns: list[str]) -> str:
    name = column
    while name in _OURS or (name != column and name in columns):
        name += "_column"
    return name


def _image(cell: object, folder: Path) -> Path | bytes:
    if isinstance(cell, dict):  # as Hugging Face's datasets keep images
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or cell in ("", b""):
        raise SampleError("no image is named")
    if isinstance(cell, str) and _URL.match(cell):
        raise SampleError("image is a URL: bring it here first, as img2dataset does, and give its path")
    if not isinstance(cell, str | bytes):
        raise SampleError(f"image is neither a path nor bytes but of type {type(cell).__name__}")
    return folder / cell if isinstance(cell, str) else cell


def _folder_pairs(folder: Path) -> Pairs:
    found = list(_files(folder))
    images = [(path, reason) for path, reason in found if reason or _looks_like_image(path)]
    captions = {(path.parent, path.stem): path for path, _ in found if path.suffix.lower() == ".txt"}
    if not images:
        raise DataError(f"{folder} holds no images: give a folder of images with captions (.txt) beside them.")
    if not any((path.parent, path.stem) in captions for path, _ in images):
        raise DataError(
            f"{folder} holds no captions (.txt) beside its {counted(len(images), 'image')}: write a.txt beside a.jpg, "
            f"or give a table ({', '.join(READERS)})."
        )

    def rows() -> Iterator[Row]:
        for number, (path, reason) in enumerate(images, 1):
            name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")
            yield Row(number, path, captions.get((path.parent, path.stem)), {"file": name}, reason)

    return Pairs(folder, len(images), rows)


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file in the order of names, hidden ones aside, and each folder that is not entered with its reason."""
    entered: set[tuple[int, int]] = set()
    found: list[tuple[Path, str]] = []

    def cannot(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise cannot_open(str(folder), error)
        found.append((Path(error.filename), f"folder cannot be read: {error.strerror}"))

    for place, folders, names in os.walk(folder, followlinks=True, onerror=cannot):
        told = Path(place).stat()
        if (told.st_dev, told.st_ino) in entered:
            found.append((Path(place), "folder was read before, by a link"))
            folders.clear()
            continue
        entered.add((told.st_dev, told.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(place, name), "") for name in names if not name.startswith(".")]
    return iter(sorted(found))


def _looks_like_image(path: Path) -> bool:
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return bool(image_format(file.read(32)))
    except OSError:  # it may be an image; packing reports the error
        return True
