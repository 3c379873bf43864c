"""A folder of an object store that is written to. Each object is there whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import DataError, MissingError
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.filesystems import filesystem_of
from data_pipelines.storage.patience import Patience
from data_pipelines.storage.wording import TransientError, explained, s3_refusal

_ATTEMPTS = 5  # of each part of an upload, within some 15 s; a file that still fails begins again
_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the disk here, which no other attempt would change

T = TypeVar("T")


class ObjectFolder:
    """The objects whose names begin with a URL and a slash.

    Args:
        url: Of whatever fsspec can write to: s3://bucket/folder, gs://bucket/folder.
        patience_s: How long a request is tried again where its error may pass.

    Each method raises DataError where the store refuses or the patience ends, MissingError where there is no such
    object or bucket, and OSError where the disk here fails.
    """

    def __init__(self, url: str, patience_s: float):
        self.url, self._patience_s = url.rstrip("/"), patience_s

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every object by its name, of all of them or of a folder below this one."""

        def find(filesystem: Any, root: str) -> dict[str, int]:
            filesystem.invalidate_cache()
            found = filesystem.find(f"{root}/{folder}".rstrip("/"), detail=True)
            return {path.removeprefix(f"{root}/"): int(about["size"]) for path, about in found.items()}

        return self._patiently("", "listed", find)

    def modified(self, name: str) -> datetime:
        return self._patiently(name, "read", lambda filesystem, root: filesystem.modified(f"{root}/{name}"))

    def upload(self, name: str, file: Path) -> None:
        """Copies a file to an object.

        Raises:
            FileNotFoundError: There is no such file.
        """
        file.stat()  # what is missing here must not read like what is missing there
        self._patiently(name, "written", lambda filesystem, root: filesystem.put_file(str(file), f"{root}/{name}"))

    def download(self, name: str, file: Path) -> None:
        self._patiently(name, "read", lambda filesystem, root: filesystem.get_file(f"{root}/{name}", str(file)))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._patiently(name, "removed", lambda filesystem, root, name=name: filesystem.rm_file(f"{root}/{name}"))

    def _patiently(self, name: str, action: str, attempt: Callable[[Any, str], T]) -> T:
        where = shown(f"{self.url}/{name}".rstrip("/"))
        patience = Patience(where, self._patience_s, setting="")
        while True:
            try:
                filesystem, root = filesystem_of(self.url, _ATTEMPTS)
                return attempt(filesystem, root)
            except DataError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _OURS:
                    raise
                if isinstance(trouble := explained(self.url, error), TransientError):
                    patience.wait(trouble, action)
                    continue
                said = s3_refusal(error)
                why = f"the server answered {said.status} {said.reason}" if said else f"{type(error).__name__}: {error}"
                raise (MissingError if isinstance(trouble, MissingError) else DataError)(
                    f"{where} cannot be {action} ({why}): see that the bucket exists, and that its "
                    f"credentials are set and may list, read, write and delete."
                ) from None
