"""What was read of a shard is kept in files of the index folder; a seal says which very file it was read from."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.shards.manifest import save_array, write_atomically
from data_pipelines.storage.addresses import is_remote
from data_pipelines.text import to_json


@dataclass
class Seal:
    """Vouches for arrays that were read from a shard as it is now.

    Times are compared for equality, since `rsync -a`, `cp -p` and unpacking give a new file an old time; and the time
    of the last change of its entry, which none of them can choose, must be equal, too.
    """

    rows: Path  # file of the shard's byte ranges, whose name the other files share
    origin: list[int | str]  # what identifies the file; empty where nothing does
    sums: dict[str, int] = field(default_factory=dict)  # CRC-32 of the arrays, by the ends of their files' names
    sha256: str = ""  # of the shard, where it was taken

    @classmethod
    def of(cls, rows: Path, location: str, version: str) -> Seal:
        """That of a shard as it is now; it vouches for nothing yet where the shard was another when it was written.

        Args:
            rows: File of the shard's byte ranges.
            location: Of the shard.
            version: Of a remote; "" where it has none.
        """
        now = _origin(location, version)
        try:
            content = json.loads(_path(rows).read_bytes())
            found = cls(rows, list(content["origin"]), dict(content["sums"]), str(content["sha256"]))
        except (OSError, ValueError, TypeError, KeyError):
            return cls(rows, now)
        return found if now and found.origin == now else cls(rows, now)

    def load(self, path: Path) -> np.ndarray | None:
        """An array that was read from this very shard; None where there is none."""
        wanted = self.sums.get(self._name(path))
        if wanted is None:
            return None
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if _crc(array) == wanted else None

    def save(self, path: Path, array: np.ndarray) -> None:
        """Keeps an array, for which `write` then vouches."""
        save_array(path, array)
        self.sums[self._name(path)] = _crc(array)

    def write(self) -> None:
        """Writes the seal."""
        content = to_json({name: getattr(self, name) for name in ("origin", "sums", "sha256")})
        write_atomically(_path(self.rows), lambda tmp: tmp.write_text(content))

    def _name(self, path: Path) -> str:
        return path.name.removeprefix(self.rows.stem)


def _origin(location: str, version: str) -> list[int | str]:
    if is_remote(location):
        return [version] if version else []
    status = os.stat(location)  # noqa: PTH116
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _path(rows: Path) -> Path:
    return rows.with_suffix(".seal.json")


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(array.tobytes())
