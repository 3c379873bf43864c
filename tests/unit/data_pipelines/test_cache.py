"""The cache of remote shards: one download a node, never a wrong byte, never more room than allowed."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage import cache as cache_module
from data_pipelines.storage.cache import ShardCache
from http_server import Fault, ShardServer, etag

ROOT = Path(__file__).parents[3]
SIZE = 100_000
CONTENTS = [np.random.default_rng(seed).bytes(SIZE) for seed in range(6)]
LONG_AGO_S = 1_000_000_000.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ShardServer()
    for number, content in enumerate(CONTENTS):
        server.put(f"{number}.tar", content)
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make_cache(folder: Path, shards: float = 10, patience_s: float = 8) -> ShardCache:
    return ShardCache(folder, int(shards * SIZE), patience_s)


def request(server: ShardServer, number: int) -> tuple[str, int, str, str]:
    content = CONTENTS[number]
    return f"{server.url}/{number}.tar", SIZE, etag(content), hashlib.sha256(content).hexdigest()


def cached(folder: Path) -> list[int]:
    """Numbers of the shards that are there whole."""
    found = set()
    for path in folder.glob("shard-*.tar"):
        with suppress(FileNotFoundError):  # removed just now
            found.add(path.read_bytes())
    assert found <= set(CONTENTS)
    return [number for number, content in enumerate(CONTENTS) if content in found]


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.name != ".lock")


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "never came true"
        time.sleep(0.005)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (LONG_AGO_S + seconds, LONG_AGO_S + seconds))


def process(script: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # pyright: ignore
    )


FETCH = """
import sys
from pathlib import Path
from data_pipelines.storage.cache import ShardCache
from data_pipelines.errors import DataError
folder, limit, url, size = sys.argv[1:]
try:
    path = ShardCache(Path(folder), int(limit), 60).fetch(url, int(size))
    print(path.stat().st_size)
except DataError as error:
    print(error)
"""


def test_a_shard_is_downloaded_once_and_then_read_from_the_disk(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    path = cache.fetch(*request(server, 0))
    assert path.read_bytes() == CONTENTS[0]
    assert path.parent == folder
    server.stop()
    assert cache.fetch(*request(server, 0)) == path
    assert make_cache(folder).open(*request(server, 0)).read(SIZE - 5, 10) == CONTENTS[0][-5:]
    assert len(server.requests) == 1
    assert names(folder) == [".tar"]


def test_another_version_is_another_shard(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    url, *_ = request(server, 0)
    old = cache.open(url, SIZE, etag(CONTENTS[0]))
    server.put("0.tar", CONTENTS[1])
    new = cache.open(url, SIZE, etag(CONTENTS[1]))
    assert (old.read(0, 9), new.read(0, 9)) == (CONTENTS[0][:9], CONTENTS[1][:9])


def test_a_large_shard_comes_in_parts(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "CHUNK", 30_000)
    server.faults.extend([Fault(), Fault(cut_after=7_000), Fault(status=503)])
    assert make_cache(folder).fetch(*request(server, 0)).read_bytes() == CONTENTS[0]
    assert server.requests[3].range == "bytes=37000-59999"


def test_an_open_shard_keeps_no_file_open_and_comes_back_when_it_was_removed(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    source = cache.open(*request(server, 0))
    assert (source.size, source.version) == (SIZE, etag(CONTENTS[0]))
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not [path for path in held if path.is_relative_to(folder)]
    cache.fetch(*request(server, 0)).unlink()
    assert source.read(17, 1000) == CONTENTS[0][17:1017]
    assert len(server.requests) == 2


def test_a_copy_that_lost_bytes_is_noticed_and_replaced(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    path = cache.fetch(*request(server, 0))
    source = cache.open(*request(server, 0))
    os.truncate(path, SIZE - 1)
    assert source.read(0, SIZE) == CONTENTS[0]
    assert len(server.requests) == 2
    assert names(folder) == [".tar"]


def test_a_shard_with_another_checksum_is_refused_and_leaves_nothing(server: ShardServer, folder: Path):
    url, size, version, _ = request(server, 0)
    with pytest.raises(DataError, match=r"0\.tar has changed: its SHA-256 is [0-9a-f]{64} but was f{64} when it was"):
        make_cache(folder).fetch(url, size, version, "f" * 64)
    assert names(folder) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=404), r"0\.tar cannot be found"),
        (Fault(status=503), r"0\.tar cannot be read at byte 0: \d attempts"),
        (Fault(body=CONTENTS[1][:-1], content_range=f"bytes 0-{SIZE - 2}/{SIZE - 1}"), "has changed: it has 99,999"),
    ],
    ids=["missing", "unreachable", "changed"],
)
def test_a_download_that_fails_says_why_and_leaves_nothing(
    fault: Fault, message: str, server: ShardServer, folder: Path
):
    server.always = fault
    with pytest.raises(DataError, match=message):
        make_cache(folder, patience_s=0.3).fetch(*request(server, 0))
    assert names(folder) == []


def test_another_version_on_the_server_is_not_taken_for_the_one_asked_for(server: ShardServer, folder: Path):
    with pytest.raises(DataError, match=r"0\.tar has changed: .* \(version before\) when it was indexed"):
        make_cache(folder).fetch(f"{server.url}/0.tar", SIZE, "before")
    assert names(folder) == []


def test_a_write_that_the_kernel_cuts_short_is_completed(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: write(descriptor, data[:30_001], offset))
    assert make_cache(folder).fetch(*request(server, 0)).read_bytes() == CONTENTS[0]


def test_threads_that_ask_at_once_share_a_download(server: ShardServer, folder: Path):
    server.delay_s = 0.3
    cache = make_cache(folder)
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda _: cache.fetch(*request(server, 0)), range(8)))
    assert {path.read_bytes() for path in paths} == {CONTENTS[0]}
    assert len(server.requests) == 1


def test_a_shard_that_another_finishes_meanwhile_is_not_downloaded_again(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    look, looks = cache_module._open_whole, []

    def look_too_early(path: Path, size: int) -> int | None:
        looks.append(path)
        if len(looks) > 1:
            return look(path, size)
        make_cache(folder).fetch(*request(server, 0))  # another process is faster
        return None

    monkeypatch.setattr(cache_module, "_open_whole", look_too_early)
    assert make_cache(folder).fetch(*request(server, 0)).read_bytes() == CONTENTS[0]
    assert len(server.requests) == 1
    assert names(folder) == [".tar"]


FORKS = """
import sys
from multiprocessing import get_context
from pathlib import Path
from data_pipelines.storage.cache import ShardCache

def fetch(cache, url, size, barrier):
    barrier.wait()
    sys.exit(0 if cache.open(url, size).read(0, size) == Path(sys.argv[5]).read_bytes() else 1)

folder, url, size, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
context = get_context("fork")
arguments = ShardCache(folder, 10 * size, 60), url, size, context.Barrier(count)
children = [context.Process(target=fetch, args=arguments) for _ in range(count)]
for child in children:
    child.start()
for child in children:
    child.join()
print([child.exitcode for child in children])
"""


@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_ask_at_once_share_a_download(count: int, server: ShardServer, folder: Path, tmp_path: Path):
    server.delay_s = 0.2
    (tmp_path / "expected").write_bytes(CONTENTS[0])
    ran = process(FORKS, folder, f"{server.url}/0.tar", SIZE, count, tmp_path / "expected")
    assert ran.communicate(timeout=60) == (f"{[0] * count}\n", "")
    assert len(server.requests) == 1


def test_a_shard_is_seen_only_once_it_is_whole(server: ShardServer, folder: Path):
    cache = make_cache(folder, patience_s=20)
    server.faults.append(Fault(stall_s=0.5))
    with ThreadPoolExecutor(1) as thread:
        fetched = thread.submit(cache.fetch, *request(server, 0))
        wait_until(lambda: server.sent >= SIZE // 2)
        assert names(folder) == [".part"]
        assert fetched.result().read_bytes() == CONTENTS[0]
    assert names(folder) == [".tar"]


@pytest.mark.parametrize("waiting", [True, False], ids=["while another waits", "before another asks"])
def test_a_download_of_a_killed_process_is_done_again_by_another(waiting: bool, server: ShardServer, folder: Path):
    cache = make_cache(folder, shards=1.5)
    url = f"{server.url}/0.tar"
    server.faults.append(Fault(stall_s=30))
    killed = process(FETCH, folder, 10 * SIZE, url, SIZE)
    wait_until(lambda: server.sent >= SIZE // 2)
    assert names(folder) == [".part"]
    with ThreadPoolExecutor(1) as thread:
        early = thread.submit(cache.fetch, url, SIZE) if waiting else None
        if early:
            time.sleep(0.2)
            assert not early.done()
        killed.kill()
        killed.communicate()
        fetched = early or thread.submit(cache.fetch, url, SIZE)
        assert fetched.result(timeout=10).read_bytes() == CONTENTS[0]
    assert names(folder) == [".tar"]


def test_a_download_that_a_killed_process_left_is_removed_to_make_room(server: ShardServer, folder: Path):
    limit = 3 * SIZE // 2
    server.faults.append(Fault(stall_s=30))
    killed = process(FETCH, folder, limit, f"{server.url}/0.tar", SIZE)
    wait_until(lambda: server.sent >= SIZE // 2)
    killed.kill()
    killed.communicate()
    assert names(folder) == [".part"]
    ShardCache(folder, limit, 2).fetch(*request(server, 1))
    assert cached(folder) == [1]
    assert names(folder) == [".tar"]


def test_the_shards_used_longest_ago_make_room(server: ShardServer, folder: Path):
    cache = make_cache(folder, shards=3)
    paths = [cache.fetch(*request(server, number)) for number in range(3)]
    for number, path in enumerate(paths):
        age(path, number)
    cache.fetch(*request(server, 3))
    assert cached(folder) == [1, 2, 3]
    for number, path in enumerate(paths[1:]):
        age(path, number)
    cache.open(*request(server, 1)).read(0, 5)
    cache.fetch(*request(server, 4))
    assert cached(folder) == [1, 3, 4]


def test_files_that_belong_to_a_shard_count_and_go_with_it_and_others_stay(server: ShardServer, folder: Path):
    cache = make_cache(folder, shards=3.1)
    first, second = (cache.fetch(*request(server, number)) for number in range(2))
    beside = [path.with_name(path.name + ".idx.npy") for path in (first, second)]
    for path in beside:
        path.write_bytes(bytes(SIZE // 4))
    strangers = [folder / name for name in ("notes.txt", f"{'0' * 32}.tar", "shard-1.zip")]
    for path in strangers:
        path.write_bytes(bytes(SIZE))
    for path in (first, beside[0], *strangers):
        age(path, 0)
    cache.fetch(*request(server, 2))  # three shards alone would have fitted
    assert cached(folder) == [1, 2]
    assert [path.exists() for path in beside] == [False, True]
    assert all(path.exists() for path in strangers)


def test_a_shard_larger_than_the_limit_is_refused_with_both_sizes(server: ShardServer, folder: Path):
    with pytest.raises(
        DataError, match=r"0\.tar has 100,000 bytes but the cache .* may hold 99,000: raise data\.cache"
    ):
        make_cache(folder, shards=0.99).fetch(*request(server, 0))
    assert names(folder) == []


def test_the_limit_holds_at_every_moment_whoever_downloads(server: ShardServer, folder: Path):
    caches = [make_cache(folder, shards=2.5, patience_s=20) for _ in range(4)]
    server.delay_s = 0.02
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            sizes = []
            with caches[0]._locked():  # or shards would come and go while they are counted
                for path in folder.glob("shard-*"):
                    with suppress(FileNotFoundError):  # of one that found no room
                        sizes.append(path.stat().st_size)
            most[0] = max(most[0], sum(sizes))
            time.sleep(0.001)

    folder.mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    numbers = [number % 6 for number in range(24)]
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda n: caches[n % 4].open(*request(server, n)).read(0, SIZE), numbers))
    finally:
        done.set()
        watcher.join()
    assert found == [CONTENTS[number] for number in numbers]
    assert SIZE < most[0] <= 2.5 * SIZE


def test_a_download_without_room_waits_for_those_under_way(server: ShardServer, folder: Path):
    cache = make_cache(folder, shards=1.5, patience_s=20)
    server.faults.append(Fault(stall_s=0.5))
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(cache.fetch, *request(server, 0))
        wait_until(lambda: server.sent >= SIZE // 2)
        cache.fetch(*request(server, 1))
        first.result()
    assert cached(folder) == [1]


def test_readers_read_on_while_their_shards_are_removed(server: ShardServer, folder: Path):
    cache = make_cache(folder, shards=1.5, patience_s=20)
    source, done = cache.open(*request(server, 0)), threading.Event()

    def read() -> int:
        count = 0
        while not done.is_set() or count == 0:
            offset = 997 * count % (SIZE - 500)
            assert source.read(offset, 500) == CONTENTS[0][offset : offset + 500]
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        for round_ in range(10):
            cache.fetch(*request(server, 1 + round_ % 2))
        done.set()
        assert all(reader.result() > 0 for reader in readers)
    assert len([one for one in server.requests if one.path == "/0.tar"]) > 1


SMALL_DISK = """
mount -t tmpfs -o size=256k none "$4" || exit 77
for name in 0 1 2; do "$1" -c "$2" "$4" 100000000 "$3/$name.tar" 100000; done
"$1" -c "$2" "$4" 100000000 "$3/large.tar" 300000
"""


def test_on_a_full_disk_old_shards_make_room_and_what_still_has_none_is_named(server: ShardServer, tmp_path: Path):
    server.put("large.tar", bytes(3 * SIZE))
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", sys.executable, FETCH]
    ran = subprocess.run(
        [*command, server.url, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if "unshare:" in ran.stderr or ran.returncode == 77:
        pytest.skip(f"no small disk can be mounted here: {ran.stderr.strip()}")
    *sizes, said = ran.stdout.splitlines()
    assert sizes == [str(SIZE)] * 3
    assert f"There is no room for shard {server.url}/large.tar in the cache {tmp_path}: it has 300,000 bytes" in said
    assert "the disk has 262,144 free and no other shard is left to remove. Free some space" in said


def test_a_folder_that_cannot_be_used_is_named_with_the_setting(server: ShardServer, folder: Path):
    folder.write_text("a file")
    make_cache(folder).prefetch([request(server, 0)])  # leaves it to the read
    with pytest.raises(
        DataError, match=r"^The cache of shards .*cache cannot be used \(.*\): see .*data\.cache\.folder"
    ):
        make_cache(folder).fetch(*request(server, 0))


def test_a_folder_that_is_removed_is_made_again(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    cache.fetch(*request(server, 0))
    shutil.rmtree(folder)
    assert cache.fetch(*request(server, 0)).read_bytes() == CONTENTS[0]


def test_prefetched_shards_come_in_order_and_once(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    cache = make_cache(folder)
    cache.prefetch(request(server, number) for number in (3, 1, 3, 0))
    cache.prefetch(request(server, number) for number in (1, 4))
    wait_until(lambda: len(cached(folder)) == 4)
    cache.prefetch(request(server, number) for number in (3, 1))
    cache.prefetch([request(server, 5)])
    wait_until(lambda: 5 in cached(folder))
    assert [request.path for request in server.requests] == [f"/{number}.tar" for number in (3, 1, 0, 4, 5)]


def test_a_read_waits_for_the_prefetch_of_its_shard(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    server.delay_s = 0.3
    cache.prefetch([request(server, 0)])
    wait_until(lambda: server.requests)
    assert cache.open(*request(server, 0)).read(5, 5) == CONTENTS[0][5:10]
    assert len(server.requests) == 1


def test_errors_of_a_prefetch_are_left_to_the_read_that_needs_the_shard(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    cache = make_cache(folder)
    server.faults.extend([Fault(status=404)] * 3)
    cache.prefetch([request(server, 0), request(server, 1), request(server, 2), request(server, 3)])
    wait_until(lambda: cached(folder) == [3])
    server.always = Fault(status=404)
    with pytest.raises(DataError, match=r"0\.tar cannot be found"):
        cache.fetch(*request(server, 0))


def test_a_prefetch_removes_what_was_not_used_for_a_minute_and_nothing_else(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    cache = make_cache(folder, shards=3)
    paths = [cache.fetch(*request(server, number)) for number in range(3)]
    cache.prefetch([request(server, 4)])  # there is no room, and it is not waited for
    time.sleep(0.3)
    assert cached(folder) == [0, 1, 2]
    age(paths[1], 0)
    cache.prefetch([request(server, 3)])
    wait_until(lambda: 3 in cached(folder))
    assert cached(folder) == [0, 2, 3]
    cache.fetch(*request(server, 4))
    assert 4 in cached(folder)


def test_a_prefetch_goes_on_to_what_has_room(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    server.faults.append(Fault(stall_s=1))
    small = server.put("small.tar", bytes(SIZE // 10))
    cache = make_cache(folder, shards=1.5, patience_s=20)
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(cache.fetch, *request(server, 0))
        wait_until(lambda: server.sent >= SIZE // 2)
        cache.prefetch([request(server, 1), (small, SIZE // 10, "", "")])
        wait_until(lambda: names(folder) == [".part", ".tar"])
        assert not slow.done()
    assert server.requests[-1].path == "/small.tar"


def test_a_prefetch_leaves_to_others_what_they_download_already(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    server.faults.append(Fault(stall_s=1))
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(make_cache(folder, patience_s=20).fetch, *request(server, 0))
        wait_until(lambda: server.sent >= SIZE // 2)
        make_cache(folder).prefetch([request(server, 0), request(server, 1)])
        wait_until(lambda: 1 in cached(folder))
        assert not slow.done()
        slow.result()
    assert len(server.requests) == 2


def test_the_queue_of_prefetches_is_bounded(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PREFETCH_THREADS", 1)
    monkeypatch.setattr(cache_module, "PREFETCH_QUEUE", 2)
    server.delay_s = 0.1
    cache = make_cache(folder)
    cache.prefetch([request(server, 0)])
    wait_until(lambda: server.requests)
    cache.prefetch(request(server, number) for number in (1, 2, 3))
    wait_until(lambda: len(cached(folder)) >= 2)
    cache.prefetch([request(server, 4)])
    wait_until(lambda: 4 in cached(folder))
    assert cached(folder) == [0, 1, 2, 4]


EXIT = """
import sys, time
from pathlib import Path
from data_pipelines.storage.cache import ShardCache
ShardCache(Path(sys.argv[1]), 10**9, 300).prefetch((f"{sys.argv[2]}/{n}.tar", 100_000, "", "") for n in range(4))
while not Path(sys.argv[1]).exists() or len(list(Path(sys.argv[1]).glob("*.part"))) < 2:
    time.sleep(0.01)
"""


def test_a_process_ends_at_once_though_it_prefetches(server: ShardServer, folder: Path):
    server.always = Fault(stall_s=30)
    began = time.monotonic()
    ran = process(EXIT, folder, server.url)
    assert ran.communicate(timeout=20) == ("", "")
    assert time.monotonic() - began < 10
    assert ran.returncode == 0


def test_a_cache_travels_to_another_process_without_its_threads(server: ShardServer, folder: Path):
    cache = make_cache(folder)
    cache.prefetch([request(server, 0)])
    wait_until(lambda: cached(folder) == [0])
    other = pickle.loads(pickle.dumps(cache))
    other.prefetch([request(server, 1)])
    wait_until(lambda: cached(folder) == [0, 1])
    assert other.open(*request(server, 0)).read(0, 9) == CONTENTS[0][:9]
