"""Writes shards with webdataset's own writer, and folders that hold all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.errors import DataError, cannot_write

_UNFINISHED = ".unfinished"


def write_shard(path: Path, samples: Iterable[dict[str, bytes | str]]) -> None:
    """Writes samples (`__key__`, and bytes by extension) as a tar; the same samples give the same bytes."""
    from webdataset.writer import TarWriter  # imports torch, which the command line must not wait for

    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for sample in samples:
            writer.write(sample)
        writer.close()


def holds_anything(folder: Path) -> bool:
    """Whether there is a folder with more in it than an interrupted run left."""
    return folder.exists() and any(entry.name != _UNFINISHED for entry in folder.iterdir())


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A place to write in, whose content moves into `folder` at the end; of a run that fails nothing stays.

    Raises:
        DataError: `folder` is not empty, or cannot be written to.
    """
    if holds_anything(folder):
        raise DataError(f"{folder} is not empty: name a new folder, or empty this one.")
    made = not folder.exists()
    place = folder / _UNFINISHED  # within, since `folder` may be a disk of its own
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(str(folder), error) from None
    try:
        yield place
        # As they were made: what a writer makes last says that all is there.
        for entry in sorted(place.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
            entry.rename(folder / entry.name)
        place.rmdir()
    except BaseException:
        shutil.rmtree(folder if made else place, ignore_errors=True)
        raise
