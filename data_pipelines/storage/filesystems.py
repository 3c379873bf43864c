"""fsspec's file systems, one per process and server, with what our reads need of them."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.storage.addresses import scheme_and_host, shown

# fsspec's event loop, and so its thread, starts with the first file system. A forked process makes its own: the loop
# does not survive a fork, and clearing fsspec's own cache there would close the parent's connections.
_filesystems: dict[tuple[int, str, int], Any] = {}


def filesystem_of(location: str, attempts: int = 1) -> tuple[Any, str]:
    """This process's file system of a location, and the location's name in it.

    Args:
        location: URL.
        attempts: Of each request to S3. One for reads, whose patience is ours; the parts of an upload need more.
    """
    scheme, host = scheme_and_host(location)
    key = os.getpid(), f"{scheme}://{host}", attempts
    filesystem = _filesystems.get(key)
    if filesystem is None:
        from fsspec.core import url_to_fs

        s3 = partial(_s3_options, attempts)
        options = {"http": _http_options, "https": _http_options, "s3": s3, "s3a": s3}
        try:
            made, _ = url_to_fs(location, skip_instance_cache=True, **options.get(scheme, dict)())
        except ImportError as error:
            raise DataError(
                f"Reading {shown(location)} needs more packages ({error}): `pip install "
                f"'vlm-pretraining-toolkit[remote]'` brings those for https, s3 and gs."
            ) from None
        except ValueError as error:
            raise DataError(
                f"{shown(location)} cannot be opened ({error}): use a path or a URL that fsspec knows, "
                f"such as https://, s3:// or gs://."
            ) from None
        if scheme in ("s3", "s3a"):
            made.retries = 1
        filesystem = _filesystems.setdefault(key, made)
    return filesystem, filesystem._strip_protocol(location)


def _http_options() -> dict[str, Any]:
    async def client(**options: Any) -> Any:
        import aiohttp

        # Proxies and .netrc from the environment; ranges are those of the file as it is stored.
        return aiohttp.ClientSession(trust_env=True, auto_decompress=False, **options)

    return {"get_client": client}


def _s3_options(attempts: int) -> dict[str, Any]:
    from fsspec.config import conf

    users = conf.get("s3", {}).get("config_kwargs", {})
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    # Botocore's ten connections would be fewer than the reads of a process. Four parts of 50 MB are uploaded at once.
    return {"config_kwargs": {"max_pool_connections": 100, **users, "retries": retries}, "max_concurrency": 4}
