"""Files on disks."""

from __future__ import annotations

import errno
import os
import stat

from data_pipelines.errors import DataError, cannot_open


class LocalFile:
    """A file on a disk.

    Args:
        descriptor: Open for reading; closed by `close`, or here on an error.
        location: Its path, for messages.

    Raises:
        DataError: It is a folder.
    """

    version = ""

    def __init__(self, descriptor: int, location: str):
        self._descriptor, self._location = descriptor, location
        status = os.fstat(descriptor)
        self.size = status.st_size
        if stat.S_ISDIR(status.st_mode):
            self.close()
            raise cannot_open(f"Shard {location}", IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more  # Linux reads at most 2 GiB at once
        except OSError as error:
            raise DataError(
                f"Shard {self._location} cannot be read at byte {offset:,} ({error.strerror}): "
                f"see that its disk answers."
            ) from None
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
