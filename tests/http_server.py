"""A web server on loopback that answers range requests and, when told to, does so badly."""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Fault:
    """How an answer differs from the right one; the default is the right one."""

    status: int = 0  # instead of an answer with bytes
    retry_after: str = ""
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    reset: bool = False  # the connection is closed before any answer
    late_s: float = 0.0  # before the answer
    stall_s: float = 0.0  # after half of the body
    content_length: int = 0  # added to the true one
    body: bytes | None = None  # instead of the true one
    without_length: bool = False  # the body ends with the connection
    content_range: str = ""  # instead of the true one
    ignores_range: bool = False
    encoding: str = ""  # Content-Encoding that is said, not done
    location: str = ""  # of a redirection

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={str(value)[:20]}" for name, value in given.items() if value != getattr(Fault, name))


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    path: str
    range: str
    headers: dict[str, str]
    time_s: float
    method: str


class ShardServer:
    """Serves `files`; answers a request with the next of `faults`, or with `always`, where there are any.

    Args:
        upstream: Host and port of a server whose answers are passed on, instead of `files`.
    """

    def __init__(self, upstream: tuple[str, int] | None = None):
        self.files: dict[str, bytes] = {}
        self.faults: deque[Fault] = deque()
        self.always = Fault()
        self.has_etags = True
        self.etags: deque[str] = deque()  # of the next answers, as of mirrors that take turns
        self.modified = ""  # Last-Modified of every file
        self.delay_s = 0.0  # before each answer
        self.requests: list[Request] = []
        self.sent = 0  # bytes of bodies
        self.upstream = upstream
        self.at_once = self.most_at_once = 0  # requests
        self._counting = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, name: str, content: bytes) -> str:
        """Adds a file and gives its URL."""
        self.files[f"/{name}"] = content
        return f"{self.url}/{name}"

    def count(self, change: int) -> None:
        with self._counting:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # clients at once; of the usual five the sixth would wait a second

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of the tests."""


def etag(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def _handler_of(shards: ShardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path  # of a proxy it is asked for a whole URL
            headers = dict(self.headers.items())
            given = self.rfile.read(int(headers.get("Content-Length", 0)))
            shards.requests.append(
                Request(self.path, headers.get("Range", ""), headers, time.monotonic(), self.command)
            )
            fault = shards.faults.popleft() if shards.faults else shards.always
            shards.count(1)
            time.sleep(shards.delay_s + fault.late_s)
            shards.count(-1)
            if fault.reset:
                self.close_connection = True
                return
            status, headers, body = self._from_upstream(given) if shards.upstream else self._from_files(path, fault)
            if fault.status:
                status, headers, body = fault.status, {}, b"no bytes of a shard"
            self._send(status, headers, body if fault.body is None else fault.body, fault)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        def _from_files(self, path: str, fault: Fault) -> tuple[int, dict[str, str], bytes]:
            if path not in shards.files:
                return 404, {}, b"not here"
            content = shards.files[path]
            version = shards.etags.popleft() if shards.etags else etag(content)
            headers = {"ETag": f'"{version}"' if "/" not in version else f'{version}"'} if shards.has_etags else {}
            headers |= {"Last-Modified": shards.modified} if shards.modified else {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not asked or fault.ignores_range:
                return 200, headers, content
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            if first >= len(content):
                return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, headers, content[first : last + 1]

        def _from_upstream(self, given: bytes) -> tuple[int, dict[str, str], bytes]:
            assert shards.upstream
            connection = http.client.HTTPConnection(*shards.upstream)
            connection.request(self.command, self.path, given, dict(self.headers.items()))
            answer = connection.getresponse()
            body = answer.read()
            hop = ("connection", "transfer-encoding", "content-length" if self.command == "GET" else "")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
            connection.close()
            return answer.status, headers, body

        def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
            self.send_response(status)
            self.close_connection = fault.without_length or fault.content_length != 0 or fault.cut_after is not None
            if not fault.without_length:
                headers = {"Content-Length": str(len(body) + fault.content_length)} | headers
            said = {
                "Content-Range": fault.content_range,
                "Content-Encoding": fault.encoding,
                "Retry-After": fault.retry_after,
                "Location": fault.location,
            }
            for name, value in (headers | {name: value for name, value in said.items() if value}).items():
                self.send_header(name, value)
            body = body[: fault.cut_after]
            half = len(body) // 2 if fault.stall_s else len(body)
            try:
                self.end_headers()
                self._write(body[:half])
                time.sleep(fault.stall_s)
                self._write(body[half:])
            except OSError:  # the client had enough
                self.close_connection = True

        def _write(self, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()
            shards.sent += len(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
