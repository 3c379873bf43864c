"""A corpus behind a server trains as the same corpus on a disk does, whatever the server does on the way."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
from corpus import Corpus, Members, caption, make_corpus

from data_pipelines.batch import BadSample
from data_pipelines.errors import DataError
from data_pipelines.shards.index import build_manifest, count_from_stats
from data_pipelines.shards.manifest import Manifest
from data_pipelines.stream.budget import BadSampleBudget
from data_pipelines.stream.loader import TrainingData
from data_pipelines.stream.reader import REMOTE_READS, ShardReader, iter_captions
from data_pipelines.tools.reshard import Resharding
from data_pipelines.tools.sources import name_sources
from http_server import Fault, ShardServer

STEPS = 14  # two epochs


@pytest.fixture(scope="module")
def server(corpus: Corpus) -> Iterator[ShardServer]:
    server = ShardServer()
    for shard in corpus.folder.glob("*.tar"):
        server.put(f"train/{shard.name}", shard.read_bytes())
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def faultless(server: ShardServer) -> None:
    server.faults.clear()
    server.always = Fault()
    server.requests.clear()


@pytest.fixture(scope="module")
def expected(corpus: Corpus) -> list[list[int]]:
    return images(corpus.training())


def images(data: TrainingData, steps: int = STEPS) -> list[list[int]]:
    return [batch.tensors["image_ids"].tolist() for batch in islice(data.batches(data.initial_state()), steps)]


def urls(server: ShardServer, corpus: Corpus) -> list[str]:
    return [f"{server.url}/train/{shard.name}" for shard in sorted(corpus.folder.glob("*.tar"))]


@pytest.fixture
def remote(server: ShardServer, corpus: Corpus, tmp_path: Path) -> Corpus:
    """The corpus by its manifest of URLs."""
    manifest, report = build_manifest(urls(server, corpus), tmp_path / "manifest.json", processes=1, patience_s=2)
    assert report.faults == []
    manifest.save()
    return replace(corpus, folder=tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, object]:
    return {"folder": str(tmp_path / "cache"), "limit_gib": 1}


def test_samples_come_by_range_requests_where_there_is_no_cache(
    remote: Corpus, expected: list[list[int]], server: ShardServer
):
    server.requests.clear()
    assert images(remote.training(patience_s=2)) == expected
    assert len(server.requests) == 24 * STEPS  # one a sample


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_downloaded_once_where_there_is_a_cache(
    remote: Corpus, expected: list[list[int]], server: ShardServer, cache: dict[str, object], workers: int
):
    server.requests.clear()
    assert images(remote.training(cache=cache, patience_s=5, workers=workers)) == expected
    assert sorted(request.path for request in server.requests) == [f"/train/{shard:05d}.tar" for shard in range(4)]
    server.requests.clear()
    assert images(remote.training(cache=cache, patience_s=5)) == expected
    assert server.requests == []


def test_shards_are_brought_into_the_cache_before_their_turn(
    remote: Corpus, server: ShardServer, cache: dict[str, object]
):
    server.requests.clear()
    data = remote.training(cache=cache, patience_s=5, lanes=1, global_batch=8)
    batches = data.batches(data.initial_state())
    next(batches)  # of one or two shards
    deadline = time.monotonic() + 20
    while len({request.path for request in server.requests}) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shards_that_were_never_indexed_are_found_out_in_the_cache(
    remote: Corpus, expected: list[list[int]], cache: dict[str, object]
):
    shutil.rmtree(remote.folder / "manifest.index")
    assert images(remote.training(cache=cache, patience_s=2)) == expected
    shutil.rmtree(remote.folder / "manifest.index")
    with pytest.raises(DataError, match=r"is remote and not indexed, .*: set data\.cache, or index it with"):
        images(remote.training(patience_s=2))


def test_counts_beside_remote_shards_are_enough_to_train(
    server: ShardServer, corpus: Corpus, expected: list[list[int]], tmp_path: Path, cache: dict[str, object]
):
    for shard, size in enumerate((70, 33, 1, 60)):
        server.put(f"train/{shard:05d}_stats.json", f'{{"successes": {size}}}'.encode())
    server.requests.clear()
    server.delay_s, server.most_at_once = 0.05, 0
    count_from_stats(urls(server, corpus), tmp_path / "manifest.json", patience_s=2).save()
    server.delay_s = 0.0
    assert server.most_at_once > 1
    assert {request.range for request in server.requests if request.path.endswith(".tar")} == {"bytes=0-0"}
    assert images(replace(corpus, folder=tmp_path).training(cache=cache, patience_s=2)) == expected


@pytest.mark.parametrize("cached", [False, True])
def test_faults_of_the_server_change_no_batch(
    remote: Corpus, expected: list[list[int]], server: ShardServer, cache: dict[str, object], cached: bool
):
    faults = [Fault(status=503), Fault(cut_after=700), Fault(reset=True), Fault(content_length=-1), Fault(status=429)]
    random = Random(0)
    server.faults.extend(random.choice(faults) if random.random() < 0.3 else Fault() for _ in range(2000))
    changes = {"cache": cache} if cached else {}
    assert images(remote.training(patience_s=20, **changes), 5) == expected[:5]


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_has_changed_on_its_server_stops_the_run(
    remote: Corpus, server: ShardServer, cache: dict[str, object], cached: bool
):
    path = "/train/00000.tar"
    good = server.files[path]
    server.files[path] = bytes(len(good))
    try:
        with pytest.raises(DataError, match=rf"Shard {server.url}{path} has changed: .* when it was indexed"):
            images(remote.training(patience_s=1, **({"cache": cache} if cached else {})))
    finally:
        server.files[path] = good


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_stops_the_run_with_one_sentence(remote: Corpus, server: ShardServer, workers: int):
    server.always = Fault(status=503)
    with pytest.raises(DataError) as error:
        images(remote.training(patience_s=1, workers=workers))
    message = str(error.value)
    assert "\n" not in message
    assert "cannot be read at byte" in message
    assert "data.patience_s" in message


def test_captions_for_a_tokenizer_are_read_many_at_a_time(remote: Corpus, corpus: Corpus, server: ShardServer):
    server.delay_s, server.most_at_once = 0.02, 0
    try:
        assert list(iter_captions(Manifest.load(remote.manifest))) == [caption(number) for number in range(164)]
    finally:
        server.delay_s = 0
    assert server.most_at_once > REMOTE_READS / 2


def signed(server: ShardServer, corpus: Corpus, signature: str) -> list[str]:
    return [f"{url}?signature={signature}" for url in urls(server, corpus)]


def test_a_run_goes_on_with_urls_that_are_signed_anew(server: ShardServer, corpus: Corpus, tmp_path: Path):
    states = []
    for signature in ("once", "later"):
        shards = signed(server, corpus, signature)
        manifest, _ = build_manifest(shards, tmp_path / signature / "manifest.json", processes=1, patience_s=2)
        manifest.save()
        states.append(replace(corpus, folder=tmp_path / signature).training(patience_s=2).initial_state())
    states[0].check_resumable(states[1])


def test_no_signature_is_told_with_what_is_wrong_with_a_shard(
    server: ShardServer, corpus: Corpus, tokenizer_path: Path, tmp_path: Path
):
    def spoilt(_: int, sample: Members) -> Members:
        return sample | {"jpg": b"junk"}

    said: list[str] = []

    def tell(action: Callable[[], object]) -> None:
        with pytest.raises(DataError) as caught:
            action()
        said.append(str(caught.value))

    bad = make_corpus(tmp_path, tokenizer_path, (20,), spoilt)
    server.put("bad/0.tar", (tmp_path / "00000.tar").read_bytes())
    url = f"{server.url}/bad/0.tar?signature=sesame"
    manifest, _ = build_manifest([url], bad.manifest, processes=1, patience_s=2)
    manifest.save()
    data = bad.training(global_batch=4, lanes=1, patience_s=2)
    tell(lambda: next(data.batches(data.initial_state())))
    tell(lambda: next(bad.heldout(patience_s=2).batches(2)))
    tell(lambda: BadSampleBudget(0, 0).add([BadSample(url, "a", "image cannot be decoded")], 1))
    tell(lambda: count_from_stats([url], tmp_path / "m.json", patience_s=0.1))
    (source,) = name_sources([str(bad.manifest)])
    tell(lambda: replace(source, entry=replace(manifest.shards[0], indexed=7)).rows(source.open(ahead=True)))
    moved = np.load(manifest.index_path(0))
    np.save(manifest.index_path(0), moved + np.array([512, 512, 0]))
    tell(lambda: ShardReader(manifest).read(0, 3))
    tell(lambda: next(iter(Resharding((source,), tmp_path / "new", 9, 0)._read(np.arange(4)))))
    manifest.index_path(0).unlink()
    tell(lambda: ShardReader(manifest).read(0, 3))
    assert all(f"{server.url}/bad/0.tar?..." in sentence and "sesame" not in sentence for sentence in said), said
