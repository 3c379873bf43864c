"""Shards in S3: a real server on loopback, and one that passes its answers on badly."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec.config
import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage import filesystems
from data_pipelines.storage.addresses import file_name
from data_pipelines.storage.files import describe, expand, open_bytes
from data_pipelines.storage.source import ByteSource
from http_server import Fault, ShardServer, etag
from object_store import object_store

CONTENT = np.random.default_rng(0).bytes(10_000)
URL = "s3://corpus/train/00001.tar"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Any, ShardServer]]:
    """One pair for all tests, as making a client of S3 takes half a second."""
    with object_store() as pair:
        yield pair


@pytest.fixture
def client(servers: tuple[Any, ShardServer]) -> Any:
    """Speaks to the server itself."""
    return servers[0]


@pytest.fixture(autouse=True)
def proxy(servers: tuple[Any, ShardServer]) -> ShardServer:
    """What is read goes through here, faultless unless told otherwise."""
    client, passes_on = servers
    client.create_bucket(Bucket="corpus")
    for name in ("00000.tar", "00001.tar", "00002.tar", "x[1].tar", "notes.txt"):
        put(client, name, CONTENT)
    passes_on.faults.clear()
    passes_on.always, passes_on.delay_s = Fault(), 0.0
    describe(URL)
    passes_on.requests.clear()
    return passes_on


@pytest.fixture
def source(proxy: ShardServer) -> ByteSource:
    return open_bytes(URL, patience_s=8, size=len(CONTENT), version=etag(CONTENT))


def put(client: Any, name: str, content: bytes, **options: str) -> None:
    client.put_object(Bucket="corpus", Key=f"train/{name}", Body=content, **options)


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (17, 4000), (9_990, 500), (10_000, 5)])
def test_any_range_of_an_object_is_what_lies_there(offset: int, size: int, source: ByteSource):
    assert source.size == len(CONTENT)
    assert source.read(offset, size) == CONTENT[offset : offset + size]


def test_an_object_is_described_by_its_size_and_etag_and_then_opened_without_a_request(proxy: ShardServer):
    size, version = describe(URL)
    assert (size, version) == (len(CONTENT), etag(CONTENT))
    assert len(proxy.requests) == 1
    open_bytes(URL, patience_s=8, size=size, version=version)
    assert len(proxy.requests) == 1


def test_patterns_are_names_folders_globs_and_braces():
    every = [f"s3://corpus/train/{name}.tar" for name in ("00000", "00001", "00002", "x[1]")]
    assert expand(["s3://corpus/train"]) == every
    assert expand(["s3://corpus/train/"]) == every
    assert expand(["s3://corpus/train/*.tar"]) == every
    assert expand(["s3://corpus/**/0000?.tar", every[1]]) == every[:3]
    assert expand(["s3://corpus/train/{00000..00002}.tar"]) == every[:3]
    assert expand(["s3://corpus/train/x[1].tar"]) == every[3:]
    assert expand(["s3://corpus/train/notes.txt"]) == ["s3://corpus/train/notes.txt"]


@pytest.mark.parametrize("pattern", ["s3://corpus/train/9*.tar", "s3://corpus/none", "s3://no-bucket/*.tar"])
def test_a_pattern_that_matches_nothing_is_named(pattern: str):
    with pytest.raises(DataError, match=r"^No shards at s3://.*: give tar files, a folder of them"):
        expand([pattern])


def test_new_objects_are_seen_by_the_next_listing(client: Any):
    put(client, "growing/0.tar", CONTENT)
    assert expand(["s3://corpus/train/growing"]) == ["s3://corpus/train/growing/0.tar"]
    put(client, "growing/1.tar", CONTENT)
    assert len(expand(["s3://corpus/train/growing"])) == 2


@pytest.mark.parametrize(
    ("location", "reason"),
    [("s3://corpus/train/none.tar", "key does not exist"), ("s3://no-bucket/a.tar", "bucket does not exist")],
)
def test_a_missing_object_or_bucket_is_said_at_once(location: str, reason: str, proxy: ShardServer):
    with pytest.raises(DataError, match=rf"Shard {location} cannot be found \(the server answered 404 .*{reason}"):
        describe(location)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(CONTENT[::-1], "10,000 bytes .* but had 10,000"), (CONTENT[:-1], "9,999 bytes .* but had 10,000")],
    ids=["other bytes", "shorter"],
)
def test_an_object_that_has_changed_is_an_error_with_both_values(
    content: bytes, message: str, client: Any, source: ByteSource
):
    put(client, "00001.tar", content)
    with pytest.raises(
        DataError, match=rf"^Shard {URL} has changed: it has {message} bytes \(version {etag(CONTENT)}\) when"
    ):
        source.read(0, 10)


def test_an_object_that_now_ends_before_the_read_has_changed(client: Any, source: ByteSource):
    put(client, "00001.tar", CONTENT[:50])
    with pytest.raises(DataError, match=rf"^Shard {URL} has changed: it ends before byte 100 but had 10,000 bytes"):
        source.read(100, 10)


def test_sixteen_threads_read_at_once(proxy: ShardServer):
    source = open_bytes(URL, patience_s=60, size=len(CONTENT))
    proxy.delay_s = 0.5
    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(lambda _: source.read(5, 5), range(16))) == {CONTENT[5:10]}
    assert proxy.most_at_once == 16


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=500),
        Fault(status=429),
        Fault(reset=True),
        Fault(cut_after=700),
        Fault(cut_after=0),
        Fault(content_length=300),
        Fault(body=CONTENT[1000:1700]),
        Fault(body=CONTENT[1000:3001], without_length=True),
        Fault(body=CONTENT[:2000], content_range=f"bytes 0-1999/{len(CONTENT)}"),
    ],
    ids=str,
)
def test_a_passing_fault_changes_no_byte(fault: Fault, proxy: ShardServer, source: ByteSource):
    proxy.faults.append(fault)
    assert source.read(1000, 2000) == CONTENT[1000:3000]
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("fault", [Fault(late_s=30), Fault(stall_s=30)], ids=str)
def test_an_answer_that_stops_coming_is_given_up(fault: Fault, proxy: ShardServer, source: ByteSource):
    impatient = open_bytes(URL, patience_s=2, size=source.size)
    proxy.faults.append(fault)
    began = time.monotonic()
    assert impatient.read(1000, 2000) == CONTENT[1000:3000]
    assert time.monotonic() - began < 15


def test_a_read_goes_on_from_where_its_connection_was_cut(proxy: ShardServer, source: ByteSource):
    proxy.faults.extend([Fault(cut_after=700)])
    assert source.read(0, 2000) == CONTENT[:2000]
    assert [request.range for request in proxy.requests] == ["bytes=0-1999", "bytes=700-1999"]


def test_a_store_that_stays_away_ends_the_patience_with_every_attempt_counted(proxy: ShardServer, source: ByteSource):
    impatient = open_bytes(URL, patience_s=1.5, size=source.size)
    error = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    proxy.always = Fault(status=503, body=error)
    with pytest.raises(DataError, match=r"cannot be read at byte 7: \d+ attempts .* 503 Please reduce") as caught:
        impatient.read(7, 5)
    assert f": {len(proxy.requests)} attempts" in str(caught.value)


def test_a_listing_waits_out_a_passing_fault(proxy: ShardServer):
    proxy.faults.append(Fault(status=503))
    assert len(expand(["s3://corpus/train/0*.tar"])) == 3
    assert not proxy.faults


def test_a_refusal_is_said_at_once_with_the_fix(proxy: ShardServer):
    proxy.always = Fault(status=403)
    with pytest.raises(DataError, match=rf"{URL} may not be read \(.*403.*\): see that the credentials are set"):
        describe(URL)
    assert len(proxy.requests) == 1


def test_missing_credentials_are_named_with_the_ways_to_give_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filesystems, "_filesystems", {})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"needs credentials \(.*\): set AWS_PROFILE, .* FSSPEC_S3_ANON=true"):
        describe(URL)


def test_settings_of_the_user_for_s3_hold(monkeypatch: pytest.MonkeyPatch, client: Any, proxy: ShardServer):
    monkeypatch.setattr(filesystems, "_filesystems", {})
    put(client, "00001.tar", CONTENT, ACL="public-read")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "config_kwargs": {"user_agent_extra": "from-config"}})
    assert describe(URL) == (len(CONTENT), etag(CONTENT))
    assert "Authorization" not in proxy.requests[0].headers
    assert "from-config" in proxy.requests[0].headers["User-Agent"]


@pytest.mark.parametrize(
    "name",
    [
        "it's a+b (1).tar",
        "100%.tar",
        "a%2Fb.tar",
        "{a,b}.tar",
        "x{1..3}.tar",
        "q?.tar",
        "a#1.tar",
        "\u4f60 \u00e9.tar",
        "s*.tar",
        "a&b=c;d@e.tar",
    ],
)
def test_an_object_named_in_full_is_that_object_whatever_its_key_holds(name: str, client: Any):
    for other in (name, "a.tar", "b.tar", "x1.tar", "star.tar"):
        put(client, other, CONTENT)
    url = f"s3://corpus/train/{name}"
    assert expand([url]) == [url]
    source = open_bytes(url, patience_s=8)
    assert source.read(5, 10) == CONTENT[5:15]


def test_an_object_asked_for_in_a_version_is_read_in_that_version(client: Any):
    client.create_bucket(Bucket="kept")
    client.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    versions = [
        client.put_object(Bucket="kept", Key="a.tar", Body=content)["VersionId"] for content in (CONTENT, CONTENT[::-1])
    ]
    urls = [f"s3://kept/a.tar?versionId={version}" for version in versions]
    assert expand(urls) == sorted(urls)
    found = [open_bytes(url, patience_s=8).read(0, 10) for url in (*urls, "s3://kept/a.tar")]
    assert found == [CONTENT[:10], CONTENT[::-1][:10], CONTENT[::-1][:10]]
    assert {file_name(url) for url in urls} == {"a.tar"}


@pytest.mark.parametrize("merges", [True, False], ids=["as s3fs does", "as it did in 2024"])
def test_whoever_pays_for_his_requests_says_so_in_each(
    merges: bool, monkeypatch: pytest.MonkeyPatch, proxy: ShardServer
):
    monkeypatch.setattr(filesystems, "_filesystems", {})
    monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": True})
    if not merges:

        def only_what_is_given(self: Any, method: Any, *given: dict[str, object], **more: object) -> object:
            return self._filter_kwargs(method, {key: value for one in (*given, more) for key, value in one.items()})

        monkeypatch.setattr("s3fs.S3FileSystem._get_s3_method_kwargs", only_what_is_given)
    assert describe(URL) == (len(CONTENT), etag(CONTENT))
    assert {request.headers.get("x-amz-request-payer") for request in proxy.requests} == {"requester"}
