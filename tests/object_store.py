"""A real server of S3 on loopback, and one in front of it that passes requests on and can do so badly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data_pipelines.storage import filesystems
from http_server import ShardServer


@contextmanager
def object_store() -> Iterator[tuple[Any, ShardServer]]:
    """A client that speaks to the store directly, and the server that this process and its children are led to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",
    )
    server = ShardServer(upstream=(host, port))
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        values = {"ACCESS_KEY_ID": "nobody", "SECRET_ACCESS_KEY": "nothing", "DEFAULT_REGION": "us-east-1"}
        files = {"CONFIG_FILE": "/dev/null", "SHARED_CREDENTIALS_FILE": "/dev/null"}
        for name, value in (values | files | {"EC2_METADATA_DISABLED": "true", "ENDPOINT_URL": server.url}).items():
            environment.setenv(f"AWS_{name}", value)
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield client, server
    filesystems._filesystems.clear()
    server.stop()
    store.stop()
