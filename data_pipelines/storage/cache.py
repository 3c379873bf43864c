"""Remote shards kept on a disk of the node: each is downloaded once, whichever processes ask for it.

A shard's name follows from what it is a copy of, and its file has that name only once it is whole. The locks are the
kernel's, which takes them back from a process that is killed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.files import open_bytes
from data_pipelines.storage.local import LocalFile
from data_pipelines.storage.source import CHUNK, ByteSource
from data_pipelines.storage.wording import wrong_sum

PREFETCH_THREADS = 2  # of a process
PREFETCH_QUEUE = 64  # shards; what is asked for beyond them is asked for again later
RECENT_S = 60.0  # a shard used since is not removed for one that is only prefetched
_TOUCH_S = 1.0  # how exactly the time of the last use is kept


@dataclass(frozen=True)
class _Original:
    """What a cached shard is a copy of."""

    location: str
    size: int  # bytes
    version: str = ""
    sha256: str = ""

    @cached_property
    def name(self) -> str:
        """Of its file in the cache."""
        what = f"{self.location}\n{self.size}\n{self.version}\n{self.sha256}"
        return f"shard-{hashlib.sha256(what.encode()).hexdigest()[:32]}.tar"


@dataclass
class _Entry:
    """A cached shard and the files whose names begin with its own."""

    paths: list[Path] = field(default_factory=list)
    bytes: int = 0
    used_s: float = 0.0


class ShardCache:
    """A folder of shards that all processes and threads of a node share.

    Args:
        folder: Made where it is missing.
        limit_bytes: Of all shards and downloads together; those used longest ago are removed to stay below.
        patience_s: How long a download is tried again after the last byte that came.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience_s: float):
        self._folder, self._limit_bytes, self._patience_s = folder, limit_bytes, patience_s
        self._wanted: OrderedDict[_Original, None] = OrderedDict()  # to be prefetched
        self._arrival = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __reduce__(self) -> tuple[object, ...]:
        return ShardCache, (self._folder, self._limit_bytes, self._patience_s)  # threads stay in their process

    def fetch(self, location: str, size: int, version: str = "", sha256: str = "") -> Path:
        """The path of a whole copy, which is downloaded if it is not there.

        It may be removed at any time to make room; `open` gives what can be relied on.

        Args:
            location: URL.
            size: In bytes.
            version: As `storage.describe` gave it; "" for any.
            sha256: Checked at the download; "" for any.

        Raises:
            DataError: The shard cannot be downloaded, is another one by now, or has no room.
        """
        original = _Original(location, size, version, sha256)
        descriptor = self._opened(original)
        assert descriptor is not None
        os.close(descriptor)
        return self._path(original)

    def open(self, location: str, size: int, version: str = "", sha256: str = "") -> ByteSource:
        """A shard to read, downloaded now if need be, and again if it is removed between two reads.

        Arguments and errors are those of `fetch`.
        """
        self.fetch(location, size, version, sha256)
        return _CachedFile(self, _Original(location, size, version, sha256))

    def prefetch(self, requests: Iterable[tuple[str, int, str, str]]) -> None:
        """Brings shards in the background, in this order; each request has the arguments of `fetch`.

        Errors are left to the read that needs the shard, and nothing is removed that was used in the last minute.
        """
        originals = [_Original(*request) for request in requests]
        try:
            missing = [original for original in originals if not self._is_there(original)]
        except OSError:
            missing = []
        if not missing:
            return
        with self._arrival:
            for original in missing:
                if len(self._wanted) < PREFETCH_QUEUE:
                    self._wanted.setdefault(original)
            while len(self._threads) < PREFETCH_THREADS:
                self._threads.append(threading.Thread(target=self._prefetch_forever, daemon=True))
                self._threads[-1].start()
            self._arrival.notify_all()

    def _prefetch_forever(self) -> None:
        while True:
            with self._arrival:
                self._arrival.wait_for(lambda: self._wanted)
                original, _ = self._wanted.popitem(last=False)
            try:
                descriptor = self._opened(original, in_background=True)
            except DataError:
                continue
            if descriptor is not None:
                os.close(descriptor)

    def _path(self, original: _Original) -> Path:
        return self._folder / original.name

    def _is_there(self, original: _Original) -> bool:
        descriptor = _open_whole(self._path(original), original.size)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def _opened(self, original: _Original, in_background: bool = False) -> int | None:
        """A descriptor of the whole shard. In the background, None where others bring it or there is no room."""
        path = self._path(original)
        part = path.with_suffix(".part")
        try:
            while (descriptor := _open_whole(path, original.size)) is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                claim = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    if not _lock(claim, wait=not in_background):
                        return None
                    # Whoever had the lock may have finished, or have thrown the file away.
                    if _is_at(part, claim) and not self._bring(original, claim, path, in_background) and in_background:
                        return None
                finally:
                    os.close(claim)
        except OSError as error:
            raise DataError(
                f"The cache of shards {self._folder} cannot be used ({error.strerror}): see that you may write there "
                f"and that its disk answers, or name another folder in data.cache.folder."
            ) from None
        return descriptor

    def _bring(self, original: _Original, claim: int, path: Path, in_background: bool) -> bool:
        """Turns the claimed and locked .part file into the shard, or removes it."""
        part, whole = path.with_suffix(".part"), False
        try:
            os.ftruncate(claim, 0)  # what a killed process left
            if not self._is_there(original) and self._make_room(original, claim, in_background):
                self._download(original, claim)
                whole = True
        finally:
            if whole:
                with self._locked():  # else a process that lists the folder could miss both names
                    part.replace(path)
            else:
                part.unlink(missing_ok=True)
        return whole

    def _download(self, original: _Original, claim: int) -> None:
        location, size, version = original.location, original.size, original.version
        digest = hashlib.sha256()
        if original.sha256:
            version = None  # the checksum decides, and mirrors have versions of their own
        with closing(open_bytes(location, size=size, version=version, patience_s=self._patience_s)) as source:
            for offset in range(0, size, CHUNK):
                data = memoryview(source.read(offset, CHUNK))
                if original.sha256:
                    digest.update(data)
                while data:
                    written = os.pwrite(claim, data, offset)
                    data, offset = data[written:], offset + written
        if original.sha256 and digest.hexdigest() != original.sha256:
            raise wrong_sum(location, digest.hexdigest(), original.sha256)
        os.fsync(claim)  # else a power failure could leave the name without the bytes

    def _make_room(self, original: _Original, claim: int, in_background: bool) -> bool:
        """Gives the claimed file its size, after removing what was used longest ago."""
        size = original.size
        if size > self._limit_bytes:
            raise DataError(
                f"Shard {shown(original.location)} has {size:,} bytes but the cache {self._folder} may hold "
                f"{self._limit_bytes:,}: raise data.cache.limit_gib above {size / 2**30:.2f}."
            )
        while True:
            with self._locked():
                under_way, shards = self._survey()
                room = self._limit_bytes - under_way - sum(shard.bytes for shard in shards)
                while True:
                    if room >= size and _allocate(claim, size):
                        return True
                    if not shards or (in_background and time.time() - shards[0].used_s < RECENT_S):
                        break
                    oldest = shards.pop(0)
                    for path in oldest.paths:
                        path.unlink(missing_ok=True)
                    room += oldest.bytes
            if in_background:
                return False
            if not under_way:
                free = shutil.disk_usage(self._folder).free
                raise DataError(
                    f"There is no room for shard {shown(original.location)} in the cache {self._folder}: it has "
                    f"{size:,} bytes, the disk has {free:,} free and no other shard is left to remove. Free some "
                    f"space, or name a folder on a larger disk in data.cache.folder."
                )
            time.sleep(0.1)  # the downloads under way end, and then they are shards that can be removed

    def _survey(self) -> tuple[int, list[_Entry]]:
        """Bytes of the downloads under way, and the shards, those used longest ago first."""
        under_way = 0
        shards: dict[str, _Entry] = defaultdict(_Entry)
        for path in self._folder.iterdir():
            if not (match := re.fullmatch(r"(shard-[0-9a-f]{32})\.(.+)", path.name)):
                continue  # not ours
            with suppress(FileNotFoundError):
                status = path.stat()
                if match[2] != "part":
                    entry = shards[match[1]]
                    entry.paths.append(path)
                    entry.bytes += status.st_size
                    entry.used_s = max(entry.used_s, status.st_mtime)
                elif not _remove_dead(path):
                    under_way += status.st_size
        return under_way, sorted(shards.values(), key=lambda entry: entry.used_s)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else makes room at the same time."""
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)


class _CachedFile:
    """Reads from the cache, and holds no file open: a removed one would go on taking room."""

    def __init__(self, cache: ShardCache, original: _Original):
        self._cache, self._original = cache, original
        self._label = f"{cache._path(original)}, a copy of {shown(original.location)},"
        self.size, self.version = original.size, original.version

    def read(self, offset: int, size: int) -> bytes:
        descriptor = self._cache._opened(self._original)
        assert descriptor is not None
        source = LocalFile(descriptor, self._label)
        try:
            return source.read(offset, size)
        finally:
            source.close()

    def close(self) -> None:
        pass


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor, and a note of the use; None unless the file is there and has its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    status = os.fstat(descriptor)
    if status.st_size != size:
        os.close(descriptor)
        return None
    if time.time() - status.st_mtime > _TOUCH_S:
        os.utime(descriptor)
    return descriptor


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_dead(part: Path) -> bool:
    """Removes the download of a process that is no more."""
    descriptor = os.open(part, os.O_RDWR)
    try:
        if not _lock(descriptor, wait=False):
            return False
        if _is_at(part, descriptor):
            part.unlink()
        return True
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> bool:
    """Takes the room of a file on the disk; False where the disk is full."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.ftruncate(descriptor, 0)
        return False
    return True
