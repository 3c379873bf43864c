"""Finds and opens files: local paths, and URLs of whatever fsspec knows."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import braceexpand

from data_pipelines.errors import DataError, MissingError, cannot_open
from data_pipelines.storage.addresses import is_remote, scheme_and_host, shown, without_version
from data_pipelines.storage.filesystems import filesystem_of
from data_pipelines.storage.local import LocalFile
from data_pipelines.storage.patience import patiently
from data_pipelines.storage.remote import HttpFile, OtherFile, S3File
from data_pipelines.storage.source import ByteSource
from data_pipelines.storage.wording import changed, explained, missing_file

LISTING_PATIENCE_S = 30.0  # someone sits and waits for the command line
_PROBE_S = 4.0  # to look for a file whose name might be a pattern


def expand(patterns: Sequence[str]) -> list[str]:
    """Files named by paths, URLs, folders (their *.tar), globs and braces such as `{00000..00099}.tar`, sorted.

    What is there by the name as it stands is that, whatever braces and stars the name holds. A web server lists no
    files, so its are named one by one or by braces. Remote files that are named in full are not looked for.

    Raises:
        DataError: A pattern matches nothing, or cannot be expanded.
        MissingError: Of the names that a brace pattern stands for, some match nothing; it names all of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = _in_braces(pattern)
        matches = {name: _remote_matches(name) if is_remote(name) else _local_matches(name) for name in names}
        missing = [name for name in names if not matches[name]]
        if missing and len(missing) < len(names):
            raise MissingError.of([shown(name) for name in missing], len(names))
        if missing:
            raise DataError(
                f"No shards at {shown(missing[0])}: give tar files, a folder of them, or a pattern like 'a/*.tar'."
            )
        found.update(match for name in names for match in matches[name])
    return sorted(found)


def describe(location: str, *, patience_s: float = LISTING_PATIENCE_S) -> tuple[int, str]:
    """Size in bytes and version of a file. The version is its ETag or time of change, or "" where it has neither.

    Raises:
        DataError: It is not there or cannot be read.
    """
    source = open_bytes(location, patience_s=patience_s)
    source.close()
    return source.size, source.version


def open_bytes(
    location: str, *, patience_s: float, size: int | None = None, version: str | None = "", sha256: str = ""
) -> ByteSource:
    """Opens a file.

    Args:
        location: Path or URL.
        patience_s: How long a remote read is tried again after the last byte that came.
        size: In bytes, where it is known; a remote is then asked for nothing before the first read.
        version: As `describe` gave it; "" for any that stays, None where someone else compares the bytes.
        sha256: Where it is known, it decides about a remote of another version, which is read as a whole for it:
            mirrors of one file have versions of their own.

    Raises:
        DataError: It is not there, cannot be read, or is not of this size and version any more. A remote with a
            given size raises that with the first read.
    """
    if is_remote(location):
        kind = {"http": HttpFile, "https": HttpFile, "s3": S3File, "s3a": S3File}
        return kind.get(scheme_and_host(location)[0], OtherFile)(location, size, version, sha256, patience_s)
    try:
        descriptor = os.open(location, os.O_RDONLY)
    except FileNotFoundError:
        raise missing_file(location) from None
    except OSError as error:
        raise cannot_open(f"Shard {location}", error) from None
    source = LocalFile(descriptor, location)
    if size is not None and source.size != size:
        source.close()
        raise changed(location, (source.size, ""), (size, ""))
    return source


def _in_braces(pattern: str) -> list[str]:
    if "{" not in pattern or (is_remote(pattern) and _is_there(pattern)):
        return [pattern]
    there, rest = ("", pattern) if is_remote(pattern) else _what_exists(pattern)
    try:
        return [there + name for name in dict.fromkeys(braceexpand(rest))]
    except ValueError:  # braces that do not pair
        return [pattern]


def _is_there(location: str) -> bool:
    """Whether a remote file has this very name."""
    try:
        describe(location, patience_s=_PROBE_S)
    except DataError:  # some stores answer 403 for what is not there
        return False
    return True


def _what_exists(name: str) -> tuple[str, str]:
    """The longest beginning of a path that is there by its name as it stands, and the rest."""
    parts = name.split("/")
    for number in range(len(parts), 0, -1):
        if os.path.exists(there := "/".join(parts[:number])):  # noqa: PTH110
            return there, name[len(there) :]
    return "", name


def _local_matches(name: str) -> list[str]:
    if Path(name).is_dir():
        matches = [str(path) for path in Path(name).glob("*.tar")]
    else:
        there, rest = _what_exists(name)
        matches = glob.glob(glob.escape(there) + rest, recursive=True) if rest else [name]  # noqa: PTH207
    return [os.path.abspath(match) for match in matches]  # noqa: PTH100


def _remote_matches(name: str) -> list[str]:
    plain, version = without_version(name)
    is_pattern = glob.has_magic(plain)
    if scheme_and_host(name)[0] in ("http", "https"):
        if name.endswith("/") or (re.search(r"[*\[]", urlsplit(name).path) and not _is_there(name)):
            raise DataError(
                f"{shown(name)} cannot be listed, because web servers list no files: name each shard, or use braces "
                f"as in https://host/{{00000..00099}}.tar."
            )
        return [name]
    if version or (name.endswith(".tar") and not is_pattern):
        return [name]
    filesystem, path = filesystem_of(name)
    prefix = name.rstrip("/").removesuffix(path)

    def matches() -> list[str]:
        filesystem.invalidate_cache()
        try:
            if filesystem.isfile(path):
                return [path]
            return filesystem.glob(path if is_pattern else f"{path}/*.tar")
        except FileNotFoundError:
            return []
        except Exception as error:
            raise explained(name, error) from None

    return [prefix + match for match in patiently(name, LISTING_PATIENCE_S, "listed", matches)]
