"""The names of files: what a path or URL says by itself, and how messages and servers are told it."""

from __future__ import annotations

import posixpath
import re
from typing import Any
from urllib.parse import quote, urlsplit

from data_pipelines.errors import DataError
from data_pipelines.redaction import redacted


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", location) is not None


def shown(location: str) -> str:
    """A location as messages print it: without user, password and query, which may hold a signature."""
    return redacted(location) if is_remote(location) else location


def file_name(location: str) -> str:
    """The last part of a path, or of a URL without its query, which is signed anew for the same file."""
    path = urlsplit(location).path if location.startswith(("http://", "https://")) else without_version(location)[0]
    return posixpath.basename(path)


def scheme_and_host(location: str) -> tuple[str, str]:
    try:
        return urlsplit(location)[:2]
    except ValueError as error:
        raise DataError(f"{shown(location)} is no URL ({error}): mend it.") from None


def without_version(location: str) -> tuple[str, str]:
    """The name of an object of S3 and the version that it is asked for in; "" for the latest."""
    name, _, version = location.partition("?versionId=")
    return name, version


def encoded(url: str) -> Any:
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
