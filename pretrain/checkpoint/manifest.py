"""MANIFEST.json, which says what bytes a checkpoint consists of, and COMMIT, which says that of MANIFEST.json."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pretrain.checkpoint.index import INTERVALS, TABLE, Count, first_of
from pretrain.checkpoint.writer import in_words

RUN = "run.json"
_MANIFEST, _COMMIT = "MANIFEST.json", "COMMIT"
_CHUNK = 2**24  # bytes

# A name cannot leave the folder: neither a separator nor a leading dot is a letter of it.
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=255)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Manifest = dict[_Name, list[tuple[Count, _Sha256]]]  # file -> its pieces, one after the other
_SCHEMA = TypeAdapter(Manifest, config=ConfigDict(strict=True))


class Piece(NamedTuple):
    """Bytes of a file."""

    file: str
    position: int
    bytes: int
    sha256: str


def seal(folder: Path, pieces: Iterable[Piece]) -> None:
    """Writes MANIFEST.json and COMMIT over all that is written, given file by file and in the order of positions.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    files = groupby(pieces, key=lambda piece: piece.file)
    text = _SCHEMA.dump_json({name: [(piece.bytes, piece.sha256) for piece in members] for name, members in files})
    write_durably(folder / _MANIFEST, text)
    write_durably(folder / _COMMIT, hashlib.sha256(text).hexdigest().encode())
    fsync_folder(folder)


def read(checkpoint: Path) -> tuple[Manifest, str | None]:
    """A checkpoint's manifest, or why there is none to rely on."""
    try:
        text = (checkpoint / _MANIFEST).read_bytes()
        commit = (checkpoint / _COMMIT).read_bytes()
        if hashlib.sha256(text).hexdigest().encode() != commit:
            return {}, "COMMIT is not the sha256 of MANIFEST.json"
        manifest = _SCHEMA.validate_json(text)
    except OSError as error:
        return {}, in_words(error)
    except ValidationError as error:
        return {}, f"{_MANIFEST}: {first_of(error)}"
    if missing := {RUN, TABLE, INTERVALS} - manifest.keys():
        return {}, f"{_MANIFEST} does not list {min(missing)}"
    return manifest, None


def is_committed(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint that was finished."""
    return (folder / _COMMIT).is_file()


def sizes(manifest: Mapping[str, list[tuple[int, str]]]) -> dict[str, int]:
    """The bytes of each file."""
    return {file: sum(size for size, _ in pieces) for file, pieces in manifest.items()}


def pieces_of(manifest: Mapping[str, list[tuple[int, str]]]) -> Iterator[Piece]:
    """All that has to be verified, in an order that every rank knows."""
    for file, pieces in sorted(manifest.items()):
        position = 0
        for size, sha256 in pieces:
            yield Piece(file, position, size, sha256)
            position += size


def check_piece(checkpoint: Path, piece: Piece, size: int) -> str | None:
    """Why a piece of a file that should have `size` bytes is not what was written."""
    digest, left = hashlib.sha256(), piece.bytes
    try:
        with (checkpoint / piece.file).open("rb") as file:
            if (there := os.fstat(file.fileno()).st_size) != size:
                return f"{piece.file} has {there} bytes instead of {size}"
            file.seek(piece.position)
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
    except OSError as error:
        return in_words(error)
    return None if digest.hexdigest() == piece.sha256 else f"{piece.file} has other content than was written"


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file, and waits for the disk.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
