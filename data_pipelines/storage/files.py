"""Bytes of shards on disks, web servers and object stores: any range of a file, or an error that says why not.

A location is a local path or a URL. A remote read is tried again until `patience_s` have passed without a new byte,
and goes on from the byte where it was cut. What would make the bytes wrong is never tried again: a missing file,
another size or version than before, a server that ignores ranges. URLs go out as they were given, byte for byte.
"""

from __future__ import annotations

import abc
import errno
import glob
import hashlib
import os
import posixpath
import re
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from braceexpand import braceexpand

from data_pipelines.errors import DataError, MissingError, cannot_open

CHUNK = 8 << 20  # bytes of one request at most
LISTING_PATIENCE_S = 30.0  # someone sits and waits for the command line
_STALL_S = 30.0  # a request that brings nothing for so long is given up
_DELAYS_S = (0.1, 30.0)  # before the second attempt, and at most
_LEAST_ATTEMPTS = 3  # a machine that was stopped for a while finds its patience used up by the first
_MAX_REDIRECTS = 10
_PROBE_S = 4.0  # to look for a file whose name might be a pattern
_LOOKS_AGAIN = 4  # to tell mirrors, which take turns, from a file that has changed
_AGAIN = "restore it, or write the manifest again with `python -m data_pipelines index`"

# Delays have to differ between ranks that met the same error, or all would come back at once. No data depends on them.
_jitter = SystemRandom()

# fsspec's event loop, and so its thread, starts with the first file system. A forked process makes its own: the loop
# does not survive a fork, and clearing fsspec's own cache there would close the parent's connections.
_filesystems: dict[tuple[int, str], Any] = {}

_proved: set[tuple[str, str, str]] = set()  # (location, version, SHA-256) that were found to belong together

T = TypeVar("T")


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


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", location) is not None


def shown(location: str) -> str:
    """A location as messages print it: without user, password and query, which may hold a signature."""
    return _scrubbed(location) if is_remote(location) else location


def file_name(location: str) -> str:
    """The last part of a path, or of a URL without its query, which is signed anew for the same file."""
    path = urlsplit(location).path if location.startswith(("http://", "https://")) else _without_version(location)[0]
    return posixpath.basename(path)


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


def _in_braces(pattern: str) -> list[str]:
    if "{" not in pattern or (is_remote(pattern) and _is_there(pattern)):
        return [pattern]
    there, rest = ("", pattern) if is_remote(pattern) else _what_exists(pattern)
    try:
        return [there + name for name in dict.fromkeys(braceexpand(rest))]
    except ValueError:  # braces that do not pair
        return [pattern]


def describe(location: str, *, patience_s: float = LISTING_PATIENCE_S) -> tuple[int, str]:
    """Size in bytes and version of a file. The version is its ETag or time of change, or "" where it has neither.

    Raises:
        DataError: It is not there or cannot be read.
    """
    source = open_bytes(location, patience_s=patience_s)
    source.close()
    return source.size, source.version


def sha256_of(source: ByteSource) -> str:
    """Hexadecimal, of all bytes."""
    digest = hashlib.sha256()
    for offset in range(0, source.size, CHUNK):
        digest.update(source.read(offset, CHUNK))
    return digest.hexdigest()


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
        kind = {"http": _HttpFile, "https": _HttpFile, "s3": _S3File, "s3a": _S3File}
        return kind.get(_scheme_and_host(location)[0], _OtherFile)(location, size, version, sha256, patience_s)
    try:
        descriptor = os.open(location, os.O_RDONLY)
    except FileNotFoundError:
        raise _missing(location) from None
    except OSError as error:
        raise cannot_open(f"Shard {location}", error) from None
    source = LocalFile(descriptor, location)
    if size is not None and source.size != size:
        source.close()
        raise _changed(location, (source.size, ""), (size, ""))
    return source


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


class _OtherVersionError(Exception):
    """An answer was of another version than those before it."""


class _TransientError(Exception):
    """A read went wrong in a way that may pass."""

    def __init__(self, what: str, retry_after_s: float = 0.0):
        super().__init__(what)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class _Answer:
    """What a server says before the bytes, and the bytes."""

    status: int
    reason: str
    headers: Mapping[str, str]  # names in lower case
    pieces: AsyncIterator[bytes] | None = None


class _Patience:
    """Waits ever longer between attempts, and gives up in the end."""

    def __init__(self, location: str, limit_s: float):
        self._location, self._limit_s = location, limit_s
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._since, self._attempts = time.monotonic(), 0

    def wait(self, trouble: _TransientError, action: str) -> None:
        """Raises DataError once the patience is used up."""
        self._attempts += 1
        waited_s = time.monotonic() - self._since
        left_s = self._limit_s - waited_s
        if left_s <= 0 and self._attempts >= _LEAST_ATTEMPTS:
            raise DataError(
                f"Shard {shown(self._location)} cannot be {action}: {self._attempts} attempts in {waited_s:.0f} s, "
                f"the last one: {trouble}. See that its server can be reached; data.patience_s is how long a read is "
                f"tried again."
            )
        first_s, most_s = _DELAYS_S
        delay_s = min(first_s * 2.0 ** min(self._attempts - 1, 20), most_s) * _jitter.uniform(0.5, 1)
        time.sleep(min(max(delay_s, trouble.retry_after_s), left_s) if left_s > 0 else delay_s)


class _RemoteFile(abc.ABC):
    """What all remotes share: attempts, patience, and the size and version that have to stay."""

    def __init__(self, location: str, size: int | None, version: str | None, sha256: str, patience_s: float):
        self._location, self._patience_s, self._sha256 = location, patience_s, sha256
        self._stall_s = min(_STALL_S, patience_s / 4)  # so that patience is long enough for several attempts
        self.size, self.version = -1 if size is None else size, version or ""
        self._any_version = version is None
        if size is None:
            _patiently(location, patience_s, "opened", self._identify)

    def read(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size)
        found = bytearray()
        patience = _Patience(self._location, self._patience_s)
        while (start := offset + len(found)) < stop:
            try:
                self._fetch(start, min(start + CHUNK, stop), found)
                patience.renew()
            except _OtherVersionError as other:
                self._settle(str(other))
                patience.renew()
            except _TransientError as trouble:
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
        """Appends bytes of [start, stop), in order and at least one, or raises _TransientError after what came."""

    def _compare(self, size: int, version: str) -> None:
        if self.size not in (-1, size):
            raise _changed(self._location, (size, version), (self.size, self.version))
        if version and self.version not in ("", version) and not self._any_version:
            raise _OtherVersionError(version)
        self.size, self.version = size, self.version or version

    def _settle(self, version: str) -> None:
        """Accepts another version where the checksum is the known one, and else says why there are two."""
        if self._sha256:
            proof = self._location, version, self._sha256
            if proof not in _proved:
                whole = open_bytes(self._location, patience_s=self._patience_s, size=self.size, version=None)
                if (found := sha256_of(whole)) != self._sha256:
                    raise wrong_sum(self._location, found, self._sha256)
                _proved.add(proof)
            self._any_version = True
            return
        for _ in range(_LOOKS_AGAIN):
            if describe(self._location, patience_s=self._patience_s) == (self.size, self.version):
                raise DataError(
                    f"Shard {shown(self._location)} has two versions in turn, {self.version} and {version}, as mirrors "
                    f"behind one name have: name one of them, or give the manifest checksums by `python -m "
                    f"data_pipelines index --checksums` of a copy, which then decide."
                )
        raise _changed(self._location, (self.size, version), (self.size, self.version))


class _RangedFile(_RemoteFile):
    """A remote that answers range requests over HTTP; each answer tells the size and the version it is of."""

    def _identify(self) -> None:
        self._fetch(0, 1, bytearray())

    def _fetch(self, start: int, stop: int, found: bytearray) -> None:
        from fsspec.asyn import sync

        filesystem, path = _filesystem(self._location)
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
                        raise _TransientError(f"more than the {after - before:,} bytes that the server announced came")
                    found += piece
                    limit.reschedule(clock() + self._stall_s)
        except TimeoutError:
            raise _TransientError(f"nothing came for {self._stall_s:g} s") from None
        if len(found) < after:
            raise _TransientError(f"the connection ended after {len(found) - before:,} of {after - before:,} bytes")

    @abc.abstractmethod
    def _answer(self, filesystem: Any, path: str, byte_range: str) -> AbstractAsyncContextManager[_Answer]:
        """Asks for a range."""

    def _judge(self, answer: _Answer, start: int, stop: int) -> int:
        """The number of bytes that follow. Raises unless they are those from `start` on, of the file as it was."""
        given = answer.headers.get("content-range", "")
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given)
            first, last = (int(match[1]), int(match[2])) if match else (-1, -1)
            if not match or not first == start <= last < stop:
                raise _TransientError(f"the server sent {given or 'an unnamed range'} for bytes {start}-{stop - 1}")
            if match[3] == "*" and self.size < 0:
                raise DataError(
                    f"Shard {shown(self._location)} cannot be opened, because its server does not tell its size "
                    f"(Content-Range: {given}): use another server, or copy the shards to a disk."
                )
            version = answer.headers.get("etag") or answer.headers.get("last-modified", "")
            self._compare(self.size if match[3] == "*" else int(match[3]), version.removeprefix("W/").replace('"', ""))
            length = answer.headers.get("content-length", "")
            if length.isdecimal() and int(length) != last + 1 - first:
                raise _TransientError(f"the server announced {int(length):,} bytes for {given}")
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
                f"when it was indexed; {_AGAIN}."
            )
        raise _refused(self._location, answer)


class _HttpFile(_RangedFile):
    """A file of a web server."""

    @asynccontextmanager
    async def _answer(self, filesystem: Any, path: str, byte_range: str) -> AsyncIterator[_Answer]:
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
                async with session.get(_encoded(path), headers=headers, **options) as answer:
                    found = {name.lower(): value for name, value in answer.headers.items()}
                    if answer.status not in (301, 302, 303, 307, 308) or "location" not in found:
                        yield _Answer(answer.status, answer.reason or "", found, answer.content.iter_any())
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
                f"Shard {shown(self._location)} cannot be opened ({_scrubbed(str(error))}): mend the URL or the "
                f"server's certificate."
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _transient(error) from None


class _S3File(_RangedFile):
    """An object of S3, or of a store that speaks its language."""

    @asynccontextmanager
    async def _answer(self, filesystem: Any, path: str, byte_range: str) -> AsyncIterator[_Answer]:
        bucket, key, _ = filesystem.split_path(path)  # which drops the version, unless it is told to keep it
        version = _without_version(path)[1]
        options = {**filesystem.req_kw, "Range": byte_range} | ({"VersionId": version} if version else {})
        try:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **options)
        except Exception as error:
            if not (refusal := _s3_refusal(error)):
                raise _explained(self._location, error) from None
            yield refusal
            return
        body, about = answer["Body"], answer["ResponseMetadata"]
        try:
            yield _Answer(about["HTTPStatusCode"], "", about["HTTPHeaders"], body.iter_chunks(1 << 20))
        except (DataError, _OtherVersionError, _TransientError):
            raise
        except Exception as error:
            raise _explained(self._location, error) from None
        finally:
            body.close()


class _OtherFile(_RemoteFile):
    """A file of whatever else fsspec knows. Only opening it tells whether it has changed."""

    def __init__(self, location: str, size: int | None, version: str | None, sha256: str, patience_s: float):
        super().__init__(location, None, "", sha256, patience_s)
        if size is not None and size != self.size:
            raise _changed(location, (self.size, self.version), (size, version or ""))
        if version and self.version and version != self.version:
            if not sha256:
                raise _changed(location, (self.size, self.version), (self.size, version))
            self._settle(self.version)

    def _identify(self) -> None:
        filesystem, path = _filesystem(self._location)
        try:
            filesystem.invalidate_cache()
            about = filesystem.info(path)
        except Exception as error:
            raise _explained(self._location, error) from None
        names = ("ETag", "etag", "generation", "mtime", "last_modified", "created")
        self.size = int(about["size"])
        self.version = next((str(about[name]).replace('"', "") for name in names if about.get(name)), "")

    def _fetch(self, start: int, stop: int, found: bytearray) -> None:
        filesystem, path = _filesystem(self._location)
        try:
            data = filesystem.cat_file(path, start=start, end=stop)
        except Exception as error:
            raise _explained(self._location, error) from None
        if not 0 < len(data) <= stop - start:
            raise _TransientError(f"{len(data):,} bytes came for {stop - start:,}")
        found += data


def _patiently(location: str, patience_s: float, action: str, attempt: Callable[[], T]) -> T:
    patience = _Patience(location, patience_s)
    while True:
        try:
            return attempt()
        except _TransientError as trouble:
            patience.wait(trouble, action)


def _scheme_and_host(location: str) -> tuple[str, str]:
    try:
        return urlsplit(location)[:2]
    except ValueError as error:
        raise DataError(f"{shown(location)} is no URL ({error}): mend it.") from None


def _filesystem(location: str) -> tuple[Any, str]:
    """This process's file system of a location, and the location's name in it."""
    scheme, host = _scheme_and_host(location)
    key = os.getpid(), f"{scheme}://{host}"
    filesystem = _filesystems.get(key)
    if filesystem is None:
        from fsspec.core import url_to_fs

        options = {"http": _http_options, "https": _http_options, "s3": _s3_options, "s3a": _s3_options}
        try:
            made, _ = url_to_fs(location, skip_instance_cache=True, **options.get(scheme, dict)())
        except ImportError as error:
            raise DataError(
                f"Reading {shown(location)} needs more packages ({error}): `pip install "
                f"'vlm-pretraining-toolkit[remote]'` brings those for https, s3 and gs."
            ) from None
        except ValueError as error:
            raise DataError(
                f"{shown(location)} cannot be opened ({_scrubbed(str(error))}): use a path or a URL that fsspec knows, "
                f"such as https://, s3:// or gs://."
            ) from None
        if scheme in ("s3", "s3a"):
            made.retries = 1
        filesystem = _filesystems.setdefault(key, made)
    return filesystem, filesystem._strip_protocol(location)


_SECRETS = ("authorization", "cookie", "proxy-authorization")


def _http_options() -> dict[str, Any]:
    async def client(**options: Any) -> Any:
        import aiohttp

        # Proxies and .netrc from the environment; ranges are those of the file as it is stored.
        return aiohttp.ClientSession(trust_env=True, auto_decompress=False, **options)

    return {"get_client": client}


def _s3_options() -> dict[str, Any]:
    from fsspec.config import conf

    users = conf.get("s3", {}).get("config_kwargs", {})
    # Botocore's ten connections would be fewer than the reads of a process. One attempt: the patience is ours.
    return {"config_kwargs": {"max_pool_connections": 100, **users, "retries": {"total_max_attempts": 1}}}


def _encoded(url: str) -> Any:
    """A URL with what may stand in none written as escapes, and everything else as it is: signatures depend on it."""
    from yarl import URL

    parts = urlsplit(url)
    if parts.fragment:
        raise DataError(
            f"{shown(url)} cannot be read, because what follows # is never sent to a server: write %23 for a # that "
            f"belongs to the name."
        )
    target = re.sub("%(?![0-9A-Fa-f]{2})", "%25", url.split("://", 1)[-1][len(parts.netloc) :])
    target = quote(target, safe="%/?:@!$&'()*+,;=-._~[]", errors="surrogateescape")
    return URL(str(URL(f"{parts.scheme}://{parts.netloc}")).rstrip("/") + (target or "/"), encoded=True)


def _without_version(location: str) -> tuple[str, str]:
    """The name of an object of S3 and the version that it is asked for in; "" for the latest."""
    name, _, version = location.partition("?versionId=")
    return name, version


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
    plain, version = _without_version(name)
    is_pattern = glob.has_magic(plain)
    if _scheme_and_host(name)[0] in ("http", "https"):
        if name.endswith("/") or (re.search(r"[*\[]", urlsplit(name).path) and not _is_there(name)):
            raise DataError(
                f"{shown(name)} cannot be listed, because web servers list no files: name each shard, or use braces "
                f"as in https://host/{{00000..00099}}.tar."
            )
        return [name]
    if version or (name.endswith(".tar") and not is_pattern):
        return [name]
    filesystem, path = _filesystem(name)
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
            raise _explained(name, error) from None

    return [prefix + match for match in _patiently(name, LISTING_PATIENCE_S, "listed", matches)]


def _s3_refusal(error: Exception) -> _Answer | None:
    answer = getattr(error.__cause__ or error, "response", None)  # of botocore's ClientError
    if not isinstance(answer, dict):
        return None
    about = answer["ResponseMetadata"]
    return _Answer(about["HTTPStatusCode"], answer["Error"].get("Message", ""), about.get("HTTPHeaders", {}))


def _explained(location: str, error: Exception) -> Exception:
    """The error to raise for one of a file system."""
    if refusal := _s3_refusal(error):
        return _refused(location, refusal)
    if isinstance(error, FileNotFoundError):
        return _missing(location)
    if isinstance(error, PermissionError):
        return _refused(location, _Answer(403, str(error), {}))
    if type(error).__name__ == "NoCredentialsError":
        return DataError(
            f"Shard {shown(location)} needs credentials ({error}): set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY; for a public bucket, FSSPEC_S3_ANON=true."
        )
    return _transient(error)


def _transient(error: Exception) -> _TransientError:
    return _TransientError(f"{type(error).__name__} ({_scrubbed(str(error))})")


def _refused(location: str, answer: _Answer) -> Exception:
    """The error to raise for an answer that brings no bytes."""
    said = f"the server answered {answer.status} {_scrubbed(answer.reason)}".rstrip()
    if answer.status in (408, 425, 429) or answer.status >= 500:
        wait = answer.headers.get("retry-after", "")
        return _TransientError(said, float(wait) if wait.isdecimal() else 0.0)
    if answer.status in (404, 410):
        return _missing(location, f" ({said})")
    if answer.status in (401, 403):
        return DataError(
            f"Shard {shown(location)} may not be read ({said}): see that the credentials are set and have not "
            f"expired, and that the name is right."
        )
    return DataError(f"Shard {shown(location)} cannot be read ({said}): see that its URL is right.")


def _missing(location: str, answer: str = "") -> MissingError:
    return MissingError(
        f"Shard {shown(location)} cannot be found{answer}: put it back, or write the manifest again with "
        f"`python -m data_pipelines index`."
    )


def wrong_sum(location: str, found: str, known: str) -> DataError:
    """What to say of a shard whose SHA-256 is another than it was."""
    return DataError(
        f"Shard {shown(location)} has changed: its SHA-256 is {found} but was {known} when it was indexed; {_AGAIN}."
    )


def _changed(location: str, found: tuple[int, str], known: tuple[int, str]) -> DataError:
    is_now, was = (f"{size:,} bytes{version and f' (version {version})'}" for size, version in (found, known))
    return DataError(
        f"Shard {shown(location)} has changed: it has {is_now} but had {was} when it was indexed; {_AGAIN}."
    )


def _scrubbed(text: str) -> str:
    text = re.sub(r"//[^/\s]*@", "//", text)
    return re.sub(r"\?[^\s'\"<>)]*", "?...", text)
