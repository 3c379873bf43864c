"""Files of web servers and object stores: any range, or an error that says why not.

A read is tried again until `patience_s` have passed without a new byte, and goes on from the byte where it was cut.
What would make the bytes wrong is never tried again: a missing file, another size or version than before, a server that
ignores ranges. URLs go out as they were given, byte for byte.
"""

from __future__ import annotations

import abc
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

from data_pipelines.errors import DataError
from data_pipelines.storage.addresses import encoded, is_remote, shown, without_version
from data_pipelines.storage.filesystems import filesystem_of
from data_pipelines.storage.patience import Patience, patiently
from data_pipelines.storage.source import CHUNK, sha256_of
from data_pipelines.storage.wording import (
    AGAIN,
    Answer,
    OtherVersionError,
    TransientError,
    changed,
    explained,
    refused,
    s3_refusal,
    transient,
    wrong_sum,
)

_STALL_S = 30.0  # a request that brings nothing for so long is given up
_MAX_REDIRECTS = 10
_LOOKS_AGAIN = 4  # to tell mirrors, which take turns, from a file that has changed
_SECRETS = ("authorization", "cookie", "proxy-authorization")
_proved: set[tuple[str, str, str]] = set()  # (location, version, SHA-256) that were found to belong together


class _RemoteFile(abc.ABC):
    """What all remotes share: attempts, patience, and the size and version that have to stay."""

    def __init__(self, location: str, size: int | None, version: str | None, sha256: str, patience_s: float):
        self._location, self._patience_s, self._sha256 = location, patience_s, sha256
        self._stall_s = min(_STALL_S, patience_s / 4)  # so that patience is long enough for several attempts
        self.size, self.version = -1 if size is None else size, version or ""
        self._any_version = version is None
        if size is None:
            patiently(location, patience_s, "opened", self._identify)

    def read(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size)
        found = bytearray()
        patience = Patience(f"Shard {shown(self._location)}", self._patience_s)
        while (start := offset + len(found)) < stop:
            try:
                self._fetch(start, min(start + CHUNK, stop), found)
                patience.renew()
            except OtherVersionError as other:
                self._settle(str(other))
                patience.renew()
            except TransientError as trouble:
                if offset + len(found) > start:
                    patience.renew()
                patience.wait(trouble, f"read at byte {offset + len(found):,}")
        return bytes(found)

    def close(self) -> None:  # noqa: B027 (nothing to do is right for all of them)
        pass  # connections belong to the process, not to a file

    @abc.abstractmethod
    def _identify(self) -> None:
        """Finds size and version."""

    @abc.abstractmethod
    def _fetch(self, start: int, stop: int, found: bytearray) -> None:
        """Appends bytes of [start, stop), in order and at least one, or raises TransientError after what came."""

    def _compare(self, size: int, version: str) -> None:
        if self.size not in (-1, size):
            raise changed(self._location, (size, version), (self.size, self.version))
        if version and self.version not in ("", version) and not self._any_version:
            raise OtherVersionError(version)
        self.size, self.version = size, self.version or version

    def _settle(self, version: str) -> None:
        """Accepts another version where the checksum is the known one, and else says why there are two."""
        if self._sha256:
            proof = self._location, version, self._sha256
            if proof not in _proved:
                whole = type(self)(self._location, self.size, None, "", self._patience_s)
                if (found := sha256_of(whole)) != self._sha256:
                    raise wrong_sum(self._location, found, self._sha256)
                _proved.add(proof)
            self._any_version = True
            return
        for _ in range(_LOOKS_AGAIN):
            now = type(self)(self._location, None, "", "", self._patience_s)
            if (now.size, now.version) == (self.size, self.version):
                raise DataError(
                    f"Shard {shown(self._location)} has two versions in turn, {self.version} and {version}, as mirrors "
                    f"behind one name have: name one of them, or give the manifest checksums by `python -m "
                    f"data_pipelines index --checksums` of a copy, which then decide."
                )
        raise changed(self._location, (self.size, version), (self.size, self.version))


class _RangedFile(_RemoteFile):
    """A remote that answers range requests over HTTP; each answer tells the size and the version it is of."""

    def _identify(self) -> None:
        self._fetch(0, 1, bytearray())

    def _fetch(self, start: int, stop: int, found: bytearray) -> None:
        from fsspec.asyn import sync

        filesystem, path = filesystem_of(self._location)
        sync(filesystem.loop, self._exchange, filesystem, path, start, stop, found)

    async def _exchange(self, filesystem: Any, path: str, start: int, stop: int, found: bytearray) -> None:
        import asyncio

        before, clock = len(found), asyncio.get_running_loop().time
        try:
            async with (
                asyncio.timeout(self._stall_s) as limit,
                self._answer(filesystem, path, f"bytes={start}-{stop - 1}") as answer,
            ):
                after = before + self._judge(answer, start, stop)
                assert answer.pieces
                async for piece in answer.pieces:
                    if len(found) + len(piece) > after:
                        del found[before:]  # no telling which of these bytes are the right ones
                        raise TransientError(f"more than the {after - before:,} bytes that the server announced came")
                    found += piece
                    limit.reschedule(clock() + self._stall_s)
        except TimeoutError:
            raise TransientError(f"nothing came for {self._stall_s:g} s") from None
        if len(found) < after:
            raise TransientError(f"the connection ended after {len(found) - before:,} of {after - before:,} bytes")

    @abc.abstractmethod
    def _answer(self, filesystem: Any, path: str, byte_range: str) -> AbstractAsyncContextManager[Answer]:
        """Asks for a range."""

    def _judge(self, answer: Answer, start: int, stop: int) -> int:
        """The number of bytes that follow. Raises unless they are those from `start` on, of the file as it was."""
        given = answer.headers.get("content-range", "")
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given)
            first, last = (int(match[1]), int(match[2])) if match else (-1, -1)
            if not match or not first == start <= last < stop:
                raise TransientError(f"the server sent {given or 'an unnamed range'} for bytes {start}-{stop - 1}")
            if match[3] == "*" and self.size < 0:
                raise DataError(
                    f"Shard {shown(self._location)} cannot be opened, because its server does not tell its size "
                    f"(Content-Range: {given}): use another server, or copy the shards to a disk."
                )
            version = answer.headers.get("etag") or answer.headers.get("last-modified", "")
            self._compare(self.size if match[3] == "*" else int(match[3]), version.removeprefix("W/").replace('"', ""))
            length = answer.headers.get("content-length", "")
            if length.isdecimal() and int(length) != last + 1 - first:
                raise TransientError(f"the server announced {int(length):,} bytes for {given}")
            return last + 1 - first
        if answer.status == 200:
            raise DataError(
                f"Shard {shown(self._location)} cannot be read in parts, because its server ignores range requests: "
                f"use another server, or copy the shards to a disk."
            )
        if answer.status == 416:  # there is no such byte
            if self.size < 0:
                raise DataError(f"Shard {shown(self._location)} is empty: make it again, or leave it out.")
            raise DataError(
                f"Shard {shown(self._location)} has changed: it ends before byte {start:,} but had {self.size:,} bytes "
                f"when it was indexed; {AGAIN}."
            )
        raise refused(self._location, answer)


class HttpFile(_RangedFile):
    """A file of a web server."""

    @asynccontextmanager
    async def _answer(self, filesystem: Any, path: str, byte_range: str) -> AsyncIterator[Answer]:
        import aiohttp

        options = {**filesystem.kwargs, "timeout": aiohttp.ClientTimeout(), "allow_redirects": False}
        headers = {
            **options.pop("headers", {}),
            "Range": byte_range,
            "Accept-Encoding": "identity",  # ranges of a compressed file are other bytes
        }
        try:
            session = await filesystem.set_session()
            for _ in range(_MAX_REDIRECTS):
                async with session.get(encoded(path), headers=headers, **options) as answer:
                    found = {name.lower(): value for name, value in answer.headers.items()}
                    if answer.status not in (301, 302, 303, 307, 308) or "location" not in found:
                        yield Answer(answer.status, answer.reason or "", found, answer.content.iter_any())
                        return
                before, to = path, found["location"].partition("#")[0]
                path = to if is_remote(to) else urljoin(before, to)
                if urlsplit(before)[:2] != urlsplit(path)[:2]:  # another host has no right to the user's secrets
                    headers = {name: value for name, value in headers.items() if name.lower() not in _SECRETS}
                    options.pop("auth", None)
            raise DataError(
                f"Shard {shown(self._location)} cannot be read, because its server redirects {_MAX_REDIRECTS} times: "
                f"name the URL that it leads to."
            )
        except (ValueError, aiohttp.ClientConnectorCertificateError) as error:
            raise DataError(
                f"Shard {shown(self._location)} cannot be opened ({error}): mend the URL or the server's certificate."
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise transient(error) from None


class S3File(_RangedFile):
    """An object of S3, or of a store that speaks its language."""

    @asynccontextmanager
    async def _answer(self, filesystem: Any, path: str, byte_range: str) -> AsyncIterator[Answer]:
        bucket, key, _ = filesystem.split_path(path)  # which drops the version, unless it is told to keep it
        version = without_version(path)[1]
        options = {**filesystem.req_kw, "Range": byte_range} | ({"VersionId": version} if version else {})
        try:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)
        except Exception as error:
            if not (refusal := s3_refusal(error)):
                raise explained(self._location, error) from None
            yield refusal
            return
        body, about = answer["Body"], answer["ResponseMetadata"]
        try:
            yield Answer(about["HTTPStatusCode"], "", about["HTTPHeaders"], body.iter_chunks(1 << 20))
        except (DataError, OtherVersionError, TransientError):
            raise
        except Exception as error:
            raise explained(self._location, error) from None
        finally:
            body.close()


class OtherFile(_RemoteFile):
    """A file of whatever else fsspec knows. Only opening it tells whether it has changed."""

    def __init__(self, location: str, size: int | None, version: str | None, sha256: str, patience_s: float):
        super().__init__(location, None, "", sha256, patience_s)
        if size is not None and size != self.size:
            raise changed(location, (self.size, self.version), (size, version or ""))
        if version and self.version and version != self.version:
            if not sha256:
                raise changed(location, (self.size, self.version), (self.size, version))
            self._settle(self.version)

    def _identify(self) -> None:
        filesystem, path = filesystem_of(self._location)
        try:
            filesystem.invalidate_cache()
            about = filesystem.info(path)
        except Exception as error:
            raise explained(self._location, error) from None
        names = ("ETag", "etag", "generation", "mtime", "last_modified", "created")
        self.size = int(about["size"])
        self.version = next((str(about[name]).replace('"', "") for name in names if about.get(name)), "")

    def _fetch(self, start: int, stop: int, found: bytearray) -> None:
        filesystem, path = filesystem_of(self._location)
        try:
            data = filesystem.cat_file(path, start=start, end=stop)
        except Exception as error:
            raise explained(self._location, error) from None
        if not 0 < len(data) <= stop - start:
            raise TransientError(f"{len(data):,} bytes came for {stop - start:,}")
        found += data
