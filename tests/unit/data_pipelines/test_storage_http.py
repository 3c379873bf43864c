"""Shards on a web server: the bytes are right or the run stops with a reason, whatever the server does."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import fsspec.config
import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage import remote
from data_pipelines.storage.files import describe, expand, open_bytes
from http_server import Fault, ShardServer, etag

ROOT = Path(__file__).parents[3]
CONTENT = np.random.default_rng(0).bytes(10_000)
PATIENCE_S = 8.0  # a request that brings nothing gets a quarter of it, which a busy machine does not use up


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ShardServer()
    yield server
    server.stop()


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (17, 4000), (9_990, 500), (10_000, 5), (0, 10_000), (3, 0)])
def test_any_range_is_what_lies_there_and_shorter_only_at_the_end(offset: int, size: int, server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S)
    assert source.size == len(CONTENT)
    assert source.read(offset, size) == CONTENT[offset : offset + size]


def test_a_large_read_is_cut_into_requests_of_limited_size(server: ShardServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "CHUNK", 4000)
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    assert source.read(0, len(CONTENT)) == CONTENT
    assert [request.range for request in server.requests] == ["bytes=0-3999", "bytes=4000-7999", "bytes=8000-9999"]


def test_a_file_of_known_size_is_opened_without_a_request(server: ShardServer):
    url = server.put("a.tar", CONTENT)
    open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version=etag(CONTENT))
    assert server.requests == []
    assert describe(url) == (len(CONTENT), etag(CONTENT))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=500),
        Fault(status=429),
        Fault(status=408),
        Fault(reset=True),
        Fault(cut_after=0),
        Fault(cut_after=700),
        Fault(content_length=-300),
        Fault(content_length=300),
        Fault(body=CONTENT[1000:1700]),
        Fault(body=CONTENT[1000:1700], without_length=True),
        Fault(body=CONTENT[1000:3001]),
        Fault(body=CONTENT[1000:3001], without_length=True),
        Fault(body=b"x" * 2001, without_length=True),
        Fault(body=b"x" * 2001, without_length=True, stall_s=0.1),
        Fault(body=b"", without_length=True),
        Fault(body=CONTENT[:2000], content_range=f"bytes 0-1999/{len(CONTENT)}"),
        Fault(content_range="bytes"),
        Fault(content_range=f"bytes 1000-999/{len(CONTENT)}", body=b""),
    ],
    ids=str,
)
def test_a_passing_fault_changes_no_byte(fault: Fault, server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.append(fault)
    assert source.read(1000, 2000) == CONTENT[1000:3000]
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [Fault(late_s=30), Fault(stall_s=30)], ids=str)
def test_an_answer_that_stops_coming_is_given_up(fault: Fault, server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=2, size=len(CONTENT))
    server.faults.append(fault)
    began = time.monotonic()
    assert source.read(1000, 2000) == CONTENT[1000:3000]
    assert time.monotonic() - began < 15


def test_a_read_goes_on_from_where_its_connection_was_cut(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.extend([Fault(cut_after=700), Fault(cut_after=200)])
    assert source.read(0, 2000) == CONTENT[:2000]
    assert [request.range for request in server.requests] == ["bytes=0-1999", "bytes=700-1999", "bytes=900-1999"]


def test_an_answer_of_fewer_bytes_than_asked_for_is_taken_and_the_rest_asked_for(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.append(Fault(body=CONTENT[:500], content_range=f"bytes 0-499/{len(CONTENT)}"))
    assert source.read(0, 2000) == CONTENT[:2000]
    assert [request.range for request in server.requests] == ["bytes=0-1999", "bytes=500-1999"]


def test_a_slow_answer_is_waited_for_as_long_as_bytes_come(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=4, size=len(CONTENT))
    server.delay_s = 0.6  # together longer than the second that a request without a byte gets
    server.faults.append(Fault(stall_s=0.6))
    assert source.read(0, 2000) == CONTENT[:2000]
    assert len(server.requests) == 1


def test_each_attempt_waits_longer_than_the_one_before(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.extend([Fault(status=503)] * 4)
    assert source.read(0, 10) == CONTENT[:10]
    times = np.array([request.time_s for request in server.requests])
    assert np.all(np.diff(times) >= [0.05, 0.1, 0.2, 0.4])


def test_a_server_that_says_when_to_come_back_is_obeyed(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.append(Fault(status=503, retry_after="1"))
    assert source.read(0, 10) == CONTENT[:10]
    assert server.requests[1].time_s - server.requests[0].time_s >= 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=503), "the server answered 503 Service Unavailable"),
        (Fault(body=b"", without_length=True), "the connection ended after 0 of 10 bytes"),
        (Fault(cut_after=0), "ClientPayloadError"),
    ],
    ids=str,
)
def test_a_server_that_never_recovers_ends_the_patience_with_url_byte_attempts_and_reason(
    fault: Fault, reason: str, server: ShardServer
):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=0.5, size=len(CONTENT))
    server.always = fault
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        source.read(1000, 10)
    assert time.monotonic() - began < 1.5
    message = f"Shard {server.url}/a.tar cannot be read at byte 1,000: {len(server.requests)} attempts in "
    assert str(caught.value).startswith(message)
    assert f"the last one: {reason}" in str(caught.value)
    assert str(caught.value).endswith("data.patience_s is how long a read is tried again.")


def test_a_server_that_is_not_there_is_named(server: ShardServer):
    url = server.put("a.tar", CONTENT)
    server.stop()
    with pytest.raises(DataError, match=r"a\.tar cannot be opened: \d attempts in .*Connect call failed"):
        describe(url, patience_s=0.3)


PAUSED = """
import sys
from data_pipelines.storage.files import open_bytes
print(len(open_bytes(sys.argv[1], patience_s=1, size=10_000).read(0, 10)))
"""


def test_a_machine_that_was_stopped_for_longer_than_its_patience_tries_again(server: ShardServer):
    server.faults.append(Fault(late_s=30))
    command = [sys.executable, "-c", PAUSED, server.put("a.tar", CONTENT)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        while not server.requests:
            time.sleep(0.01)
        reader.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        reader.send_signal(signal.SIGCONT)
        assert reader.communicate(timeout=20) == ("10\n", "")


def test_every_new_byte_renews_the_patience(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=0.3, size=len(CONTENT))
    server.always = Fault(cut_after=1000)
    began = time.monotonic()
    assert source.read(0, len(CONTENT)) == CONTENT
    assert time.monotonic() - began > 0.3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"a\.tar cannot be found \(the server answered 404 Not Found\): put it back"),
        (410, r"a\.tar cannot be found"),
        (403, r"a\.tar may not be read \(the server answered 403 Forbidden\): see that the credentials"),
        (401, r"a\.tar may not be read"),
        (400, r"a\.tar cannot be read \(the server answered 400 Bad Request\): see that its URL is right"),
    ],
)
def test_what_no_attempt_would_change_is_said_at_once(status: int, message: str, server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.always = Fault(status=status)
    with pytest.raises(DataError, match=message):
        source.read(0, 10)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[::-1], r"has 10,000 bytes \(version {now}\) but had 10,000 bytes \(version {then}\) when it was ind"),
        (CONTENT[:-1], r"it has 9,999 bytes .* but had 10,000 bytes"),
        (CONTENT[:50], r"it ends before byte 100 but had 10,000 bytes"),
    ],
    ids=["other bytes", "shorter by one", "ends before the read"],
)
def test_a_file_that_has_changed_is_an_error_with_both_values(content: bytes, message: str, server: ShardServer):
    url = server.put("a.tar", CONTENT)
    known = open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version=etag(CONTENT))
    opened = open_bytes(url, patience_s=PATIENCE_S)
    assert opened.read(100, 10) == CONTENT[100:110]
    server.put("a.tar", content)
    message = message.format(now=etag(content), then=etag(CONTENT))
    for source in (known, opened):
        with pytest.raises(DataError, match=rf"a\.tar has changed: .*{message}.*write the manifest again"):
            source.read(100, 10)


def test_a_change_between_two_parts_of_one_read_is_met(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S, size=len(CONTENT))
    server.faults.append(Fault(cut_after=700))
    server.faults.append(Fault(status=503, retry_after="1"))
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(source.read, 0, 2000)
        while len(server.requests) < 2:
            time.sleep(0.01)
        server.put("a.tar", CONTENT[::-1])
        with pytest.raises(DataError, match="has changed"):
            read.result()


def test_without_etags_the_time_of_change_is_the_version(server: ShardServer):
    server.has_etags, server.modified = False, "Sun, 22 Nov 2026 10:00:00 GMT"
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S)
    assert source.version == server.modified
    server.modified = "Sun, 22 Nov 2026 11:00:00 GMT"
    with pytest.raises(DataError, match=r"version Sun, 22 Nov 2026 11:00:00 GMT\) but had"):
        source.read(0, 10)
    server.modified = ""
    assert describe(f"{server.url}/a.tar") == (len(CONTENT), "")


def test_without_any_version_the_size_has_to_stay(server: ShardServer):
    server.has_etags = False
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=PATIENCE_S)
    server.put("a.tar", CONTENT + b"x")
    with pytest.raises(DataError, match=r"has changed: it has 10,001 bytes but had 10,000 bytes when it was indexed"):
        source.read(0, 10)


def test_a_server_that_ignores_ranges_is_refused_before_it_has_sent_the_file(server: ShardServer):
    content, server.has_etags = bytes(32 << 20), False
    source = open_bytes(server.put("a.tar", content), patience_s=PATIENCE_S, size=len(content))
    server.always = Fault(ignores_range=True)
    with pytest.raises(DataError, match=r"a\.tar cannot be read in parts, because its server ignores range requests: "):
        source.read(0, 10)
    assert len(server.requests) == 1
    assert server.sent < len(content)


def test_an_empty_file_is_said_to_be_empty(server: ShardServer):
    with pytest.raises(DataError, match=r"a\.tar is empty"):
        describe(server.put("a.tar", b""))


def test_bytes_are_those_that_are_stored_even_where_they_are_compressed(server: ShardServer):
    source = open_bytes(server.put("a.tar.gz", CONTENT), patience_s=PATIENCE_S)
    server.always = Fault(encoding="gzip")
    assert source.read(100, 10) == CONTENT[100:110]
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


def test_a_redirection_is_followed(server: ShardServer):
    url = server.put("new.tar", CONTENT)
    server.faults.append(Fault(status=302, location=url))
    source = open_bytes(f"{server.url}/old.tar", patience_s=PATIENCE_S, size=len(CONTENT))
    assert source.read(5, 10) == CONTENT[5:15]
    assert [request.path for request in server.requests] == ["/old.tar", "/new.tar"]


def test_headers_and_proxies_of_the_user_are_used(server: ShardServer, monkeypatch: pytest.MonkeyPatch):
    server.put("a.tar", CONTENT)
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Token": "sesame"}})
    source = open_bytes("http://nowhere.invalid/a.tar", patience_s=PATIENCE_S)
    assert source.read(5, 10) == CONTENT[5:15]
    assert server.requests[1].path == "http://nowhere.invalid/a.tar"
    assert server.requests[1].headers["X-Token"] == "sesame"


@pytest.mark.parametrize("fault", [Fault(status=404), Fault(status=503), Fault(ignores_range=True)], ids=str)
def test_passwords_and_signatures_are_sent_and_not_printed(fault: Fault, server: ShardServer):
    server.put("a.tar", CONTENT)
    secret = f"http://user:pass@127.0.0.1:{server.port}/a.tar?X-Signature=sesame&token=t"
    assert describe(secret) == (len(CONTENT), etag(CONTENT))
    assert "Authorization" in server.requests[0].headers
    assert "sesame" in server.requests[0].path
    server.always = fault
    with pytest.raises(DataError) as caught:
        describe(secret, patience_s=0.2)
    assert f"Shard http://127.0.0.1:{server.port}/a.tar?... " in str(caught.value)
    assert not [word for word in ("user", "pass", "sesame", "token") if word in str(caught.value)]


def test_a_url_that_is_none_and_a_protocol_that_nobody_knows_are_named():
    with pytest.raises(DataError, match=r"Shard http:// cannot be opened \(.*\): mend the URL"):
        describe("http://")
    with pytest.raises(DataError, match=r"foo://bar/a\.tar cannot be opened .*foo.*such as https://, s3:// or gs://"):
        describe("foo://bar/a.tar")


def test_shards_of_a_web_server_are_named_one_by_one_or_by_braces(server: ShardServer):
    names = [f"{server.url}/{number:05d}.tar?x=1" for number in range(3)]
    assert expand([f"{server.url}/{{00000..00002}}.tar?x=1", names[1]]) == names
    for pattern in ("*.tar", "folder/", "[ab].tar"):
        with pytest.raises(DataError, match=r"^http://127\S+ cannot be listed, .* or use braces"):
            expand([f"http://user:pw@127.0.0.1:{server.port}/{pattern}"])


@pytest.mark.parametrize("name", ["{a,b}.tar", "x[1].tar", "all*.tar", "what?.tar"])
def test_a_file_of_a_web_server_whose_name_looks_like_a_pattern_is_that_file(name: str, server: ShardServer):
    for other in (quote(name, safe="[]*?,"), "a.tar", "b.tar"):
        server.put(other.partition("?")[0], CONTENT)
    assert expand([f"{server.url}/{name}"]) == [f"{server.url}/{name}"]
    assert describe(f"{server.url}/{name}")[0] == len(CONTENT)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("/a.tar?sig=a%2Fb%2Cc%3D%27", "/a.tar?sig=a%2Fb%2Cc%3D%27"),
        ("/it%27s%2C%20%7Ea.tar?x=%7e", "/it%27s%2C%20%7Ea.tar?x=%7e"),
        ("/a.tar?Signature=a+b/c=&Expires=1", "/a.tar?Signature=a+b/c=&Expires=1"),
        ("/it's,(a)!*$;@:~.tar?a='b',c", "/it's,(a)!*$;@:~.tar?a='b',c"),
        ("/%e4%bd%a0.tar", "/%e4%bd%a0.tar"),
        ("/a%2f%2e%2e%2fb.tar", "/a%2f%2e%2e%2fb.tar"),
        ("/x/../a.tar", "/x/../a.tar"),
        ("/a.tar?x=%3f%23&y=[1]", "/a.tar?x=%3f%23&y=[1]"),
        ("/a b.tar", "/a%20b.tar"),  # what may stand in no URL is written as an escape
        ("/\u4f60.tar?q=\u00e9", "/%E4%BD%A0.tar?q=%C3%A9"),
        ("/100%.tar", "/100%25.tar"),
        ('/a"b<c>\\.tar', "/a%22b%3Cc%3E%5C.tar"),
        ("", "/"),
        ("?sig=%2F", "/?sig=%2F"),
    ],
)
def test_a_url_goes_out_byte_for_byte_and_so_does_that_of_a_redirection(given: str, sent: str, server: ShardServer):
    server.files[sent.partition("?")[0]] = CONTENT
    assert describe(server.url + given)[0] == len(CONTENT)
    assert server.requests.pop().path == sent
    if given.startswith("/") and given.isascii():
        for location in (server.url + given, given)[: 1 + (".." not in given)]:
            server.faults.append(Fault(status=302, location=location))
            assert describe(f"{server.url}/old")[0] == len(CONTENT)
            assert server.requests.pop().path == sent


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("user", ["me:pw@", ""])
def test_another_host_is_sent_the_range_and_none_of_the_users_secrets(
    status: int, user: str, server: ShardServer, monkeypatch: pytest.MonkeyPatch
):
    if not user:
        monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer sesame"}})
    other = ShardServer()
    try:
        other.put("signed.tar", CONTENT)
        server.faults.append(Fault(status=status, location=f"{other.url}/signed.tar?s=%2F"))
        source = open_bytes(f"http://{user}127.0.0.1:{server.port}/a.tar", patience_s=PATIENCE_S, size=len(CONTENT))
        assert source.read(5, 10) == CONTENT[5:15]
        assert "Authorization" in server.requests[0].headers
        assert "Authorization" not in other.requests[0].headers
        assert (other.requests[0].path, other.requests[0].range) == ("/signed.tar?s=%2F", "bytes=5-14")
    finally:
        other.stop()


def test_redirections_without_an_end_are_told(server: ShardServer):
    server.always = Fault(status=302, location="/again.tar")
    with pytest.raises(DataError, match=r"a\.tar cannot be read, because its server redirects 10 times: name the URL"):
        describe(f"{server.url}/a.tar")
    server.always = Fault(status=302)
    with pytest.raises(DataError, match=r"a\.tar cannot be read \(the server answered 302 Found\): see that its URL"):
        describe(f"{server.url}/a.tar")


def test_a_fragment_which_no_server_would_see_is_refused(server: ShardServer):
    with pytest.raises(DataError, match=r"a#1\.tar cannot be read, because what follows # is never sent .* write %23"):
        describe(f"{server.url}/a#1.tar")


@pytest.mark.parametrize("url", ["http://[bad/a.tar", "http://host:99999/a.tar", "https://[::1/{0..3}.tar"])
def test_what_is_no_url_is_refused_in_one_sentence(url: str):
    with pytest.raises(DataError, match=r"(is no URL|cannot be opened) .*mend"):
        describe(expand([url])[0])


def test_a_server_that_does_not_tell_the_size_is_said_to_at_once(server: ShardServer):
    url = server.put("a.tar", CONTENT)
    server.always = Fault(content_range="bytes 0-0/*")
    with pytest.raises(
        DataError, match=r"a\.tar cannot be opened, .* not tell its size \(Content-Range: bytes 0-0/\*\)"
    ):
        describe(url)
    assert len(server.requests) == 1
    server.always = Fault(content_range="bytes 5-14/*")
    assert open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT)).read(5, 10) == CONTENT[5:15]


@pytest.mark.parametrize("turns", ["ABAB", "BABA", "BBAB"])
def test_mirrors_with_versions_of_their_own_are_told_for_what_they_are(turns: str, server: ShardServer):
    url = server.put("a.tar", CONTENT)
    server.etags.extend(turns)
    source = open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version="A")

    def read() -> None:
        for _ in turns:
            source.read(0, 10)

    with pytest.raises(DataError, match=r"a\.tar has two versions in turn, A and B, as mirrors behind one name have:"):
        read()


def test_of_mirrors_the_checksum_of_the_manifest_decides(server: ShardServer):
    url, known = server.put("a.tar", CONTENT), sha256(CONTENT).hexdigest()
    server.etags.extend("AABBABABAB")
    source = open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version="A", sha256=known)
    assert [source.read(at, 10) for at in range(4)] == [CONTENT[at : at + 10] for at in range(4)]
    whole = f"bytes=0-{len(CONTENT) - 1}"
    server.etags.extend("B")  # which was looked at before
    open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version="A", sha256=known).read(0, 10)
    assert [request.range for request in server.requests].count(whole) == 1
    server.etags.clear()
    server.put("a.tar", CONTENT[::-1])
    server.etags.clear()
    with pytest.raises(DataError, match=rf"a\.tar has changed: its SHA-256 is \w+ but was {known} when it was indexed"):
        open_bytes(url, patience_s=PATIENCE_S, size=len(CONTENT), version="A", sha256=known).read(0, 10)


def test_a_weak_etag_is_that_of_the_same_file(server: ShardServer):
    url = server.put("a.tar", CONTENT)
    server.etags.extend(["A", 'W/"A', "A"])
    source = open_bytes(url, patience_s=PATIENCE_S)
    assert source.read(0, 10) + source.read(10, 10) == CONTENT[:20]


def test_many_threads_read_one_source_at_once(server: ShardServer):
    source = open_bytes(server.put("a.tar", CONTENT), patience_s=60, size=len(CONTENT))
    server.faults.extend([Fault(cut_after=40), Fault(status=503), Fault(reset=True)] * 3)
    offsets = range(0, 9000, 90)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda offset: source.read(offset, 100), offsets))
    assert found == [CONTENT[offset : offset + 100] for offset in offsets]


def run(script: str, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def test_importing_storage_starts_no_thread_and_loads_nothing_heavy():
    script = """
import sys, threading
from data_pipelines.storage.files import expand
assert expand([sys.executable])
print(threading.active_count(), sorted({"fsspec", "aiohttp", "asyncio", "s3fs", "torch", "numpy"} & set(sys.modules)))
"""
    assert run(script) == "1 []\n"


FORKS = """
import multiprocessing, sys
from data_pipelines.storage.files import open_bytes

def read(source, offset):
    return source.read(offset, 5)

if __name__ == "__main__":
    source = open_bytes(sys.argv[1], patience_s=60, size=10_000)
    if sys.argv[2] == "fork":
        source.read(0, 5)  # the event loop runs when the child is forked
    context = multiprocessing.get_context(sys.argv[2])
    if sys.argv[2] == "forkserver":
        context.set_forkserver_preload(["data_pipelines.storage.files"])
    with context.Pool(2) as pool:
        children = pool.starmap(read, [(source, 10 * number) for number in range(4)], chunksize=1)
        print(children == [source.read(10 * number, 5) for number in range(4)])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_read_what_their_parent_reads(method: str, server: ShardServer, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(FORKS)
    url = server.put("a.tar", CONTENT)
    process = subprocess.run(
        [sys.executable, str(script), url, method],
        env={"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.stdout, process.stderr) == ("True\n", "")


def test_a_missing_package_is_named_with_the_command_that_brings_it(server: ShardServer):
    script = """
import sys
sys.modules["aiohttp"] = None
from data_pipelines.errors import DataError
from data_pipelines.storage.files import describe
try:
    describe(sys.argv[1])
except DataError as error:
    print(error)
"""
    said = run(script, server.put("a.tar", CONTENT))
    assert said.startswith(f"Reading {server.url}/a.tar needs more packages (")
    assert "`pip install 'vlm-pretraining-toolkit[remote]'` brings" in said
