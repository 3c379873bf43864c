"""Writes shards with webdataset's own writer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def write_shard(path: Path, samples: Iterable[dict[str, bytes | str]]) -> None:
    """Writes samples (`__key__`, and bytes by extension) as a tar; the same samples give the same bytes."""
    from webdataset.writer import TarWriter  # imports torch, which the command line must not wait for

    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for sample in samples:
            writer.write(sample)
        writer.close()
