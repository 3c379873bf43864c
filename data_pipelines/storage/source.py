"""An open file, whatever it lies on."""

from __future__ import annotations

import hashlib
from typing import Protocol

CHUNK = 8 << 20  # bytes of one request at most


class ByteSource(Protocol):
    """An open file, read by any number of threads at once."""

    size: int
    version: str  # of a remote: its ETag or time of change; "" where nothing tells

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on, fewer than `size` only at the end of the file.

        Raises:
            DataError: They cannot be read.
        """
        ...

    def close(self) -> None:
        """Frees what is open."""
        ...


def sha256_of(source: ByteSource) -> str:
    """Hexadecimal, of all bytes."""
    digest = hashlib.sha256()
    for offset in range(0, source.size, CHUNK):
        digest.update(source.read(offset, CHUNK))
    return digest.hexdigest()
