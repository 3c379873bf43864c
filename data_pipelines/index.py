"""Makes manifests: one scan of the shards' headers finds the usable samples and says why others are not.

All filtering happens here, so that nothing has to be skipped while training. Beside each shard goes
`<shard>.idx.npy`, the byte ranges of its usable samples; a reader that misses it makes its own.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import braceexpand
import numpy as np

from data_pipelines.errors import DataError, cannot_open
from data_pipelines.manifest import Manifest, Shard, normalised, write_atomically
from data_pipelines.tar import TarError, TarSample, iter_members, iter_samples

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Dropped:
    """A sample that the index leaves out."""

    shard: str
    key: str
    reason: str


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """Shards named by files, folders (their *.tar), globs and braces such as `{00000..00099}.tar`, sorted.

    Raises:
        DataError: A pattern matches nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            if Path(name).is_dir():
                matches = [str(path) for path in Path(name).glob("*.tar")]
            else:
                matches = [name] if Path(name).is_file() else glob.glob(name, recursive=True)  # noqa: PTH207
            if not matches:
                raise DataError(f"No shards at {name}: give tar files, a folder of them, or a pattern like 'a/*.tar'.")
            found.update(normalised(Path(match)) for match in matches)
    return sorted(found)


def build_manifest(
    shards: Sequence[Path],
    path: Path,
    *,
    processes: int | None = None,
    on_shard: Callable[[Shard], None] = lambda shard: None,
) -> tuple[Manifest, list[Dropped]]:
    """Scans every shard's headers once, in parallel, and writes its index beside it.

    Args:
        shards: The tars, in the manifest's order.
        path: Where the manifest will be saved.
        processes: By default one per core; 1 scans in this process.
        on_shard: Called as each shard is done, in any order.

    Returns:
        The manifest, not yet saved, and every sample that was left out.

    Raises:
        DataError: A shard is corrupt, or there is nothing usable.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(shards))
    scans: dict[Path, tuple[Shard, list[Dropped]]] = {}
    if processes <= 1:
        for shard in shards:
            scans[shard] = _index_shard(shard)
            on_shard(scans[shard][0])
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(_index_shard, shard): shard for shard in shards}
            try:
                for future in as_completed(futures):
                    scans[futures[future]] = future.result()
                    on_shard(scans[futures[future]][0])
            except DataError:
                pool.shutdown(cancel_futures=True)
                raise
    dropped = [drop for shard in shards for drop in scans[shard][1]]
    manifest = Manifest(tuple(scans[shard][0] for shard in shards), normalised(path).parent)
    if manifest.samples == 0:
        hint = f"; the first of {len(dropped):,} left out: {dropped[0].key}, {dropped[0].reason}" if dropped else ""
        raise DataError(
            f"No usable sample in {len(shards)} shards{hint}: a sample needs an image "
            f"({', '.join(IMAGE_EXTENSIONS)}) and a caption (.txt, or `caption` in .json) under one key."
        )
    return manifest, dropped


def index_path(shard: Path) -> Path:
    """Where the byte ranges of a shard's samples are kept."""
    return shard.with_name(shard.name + ".idx.npy")


def scan_shard(shard: Path) -> tuple[np.ndarray, list[Dropped]]:
    """Byte ranges (n, 2) int64 [start, stop) of the usable samples, and those that are not usable.

    Raises:
        DataError: The tar cannot be opened, is corrupt or truncated, or a key comes back after other samples.
    """
    ranges: list[tuple[int, int]] = []
    dropped: list[Dropped] = []
    keys: set[str] = set()
    try:
        file = shard.open("rb", buffering=0)
    except OSError as error:
        raise cannot_open(f"Shard {shard}", error) from None
    with file:

        def read(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        try:
            for sample in iter_samples(iter_members(read, os.fstat(file.fileno()).st_size, whole=True)):
                if sample.key in keys:
                    raise TarError(sample.start, f"key {sample.key} comes back after other samples,")
                keys.add(sample.key)
                if reason := _unusable(sample, read):
                    dropped.append(Dropped(str(shard), sample.key, reason))
                else:
                    ranges.append((sample.start, sample.stop))
        except TarError as error:
            raise DataError(
                f"Shard {shard} is corrupt: {error}. Make it again, or leave it out of the manifest."
            ) from None
    return np.array(ranges, dtype=np.int64).reshape(-1, 2), dropped


def _index_shard(shard: Path) -> tuple[Shard, list[Dropped]]:
    ranges, dropped = scan_shard(shard)
    write_atomically(index_path(shard), lambda tmp: _save_array(tmp, ranges))
    return Shard(shard, len(ranges), shard.stat().st_size), dropped


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # numpy adds .npy to a bare name
        np.save(file, array)


def _unusable(sample: TarSample, read: Callable[[int, int], bytes]) -> str | None:
    if not any(extension in sample.members for extension in IMAGE_EXTENSIONS):
        return "no image"
    if text := sample.members.get("txt"):
        return None if text.size else "empty caption"
    if not (member := sample.members.get("json")):
        return "no caption"
    try:
        metadata = json.loads(read(member.start, member.size))
    except ValueError:
        return "unreadable json"
    caption = metadata.get("caption") if isinstance(metadata, dict) else None
    return None if isinstance(caption, str) and caption.strip() else "no caption"
