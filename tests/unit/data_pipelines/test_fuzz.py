"""Whatever becomes of a shard's bytes: exact counts, true pairs, one sentence; nothing hangs, fires or fills memory."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus import caption, jpeg, make_corpus, member

from data_pipelines.batch import BadSample
from data_pipelines.errors import DataError
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Fault
from data_pipelines.shards.scan import FeatureFields, features, scan
from data_pipelines.shards.writer import write_shard
from data_pipelines.storage.files import open_bytes
from data_pipelines.stream.budget import BadSampleBudget
from data_pipelines.stream.reader import ShardReader
from fuzz.mutants import BLOCK, FIRED, KINDS, TAGS, make_mutant, pickled, sealed, shards
from fuzz.oracle import read_shard
from fuzz.sources import KINDS as KINDS_OF_SOURCES
from fuzz.sources import try_source
from fuzz.trial import Bench, bounded_memory, try_mutant

SEED = 20261122
MUTANTS = 2010  # 100 a second on an idle core
SOURCES = 250  # 50 a second


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bench:
    return Bench.made(tmp_path_factory.mktemp("fuzz"), tokenizer_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("part", range(3))
def test_of_any_mutant_come_its_whole_samples_and_one_sentence_on_the_rest(
    bench: Bench, part: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(bench.folder)
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    with bounded_memory():
        for number in range(part, MUTANTS, 3):
            mutant = make_mutant(number, SEED)
            kinds[mutant.kind] += 1
            try:
                try_mutant(bench, mutant, outcomes)
            except Exception as error:
                error.add_note(f"mutant {number}: {mutant.kind}")
                raise
    assert kinds.keys() == KINDS.keys()
    assert min(outcomes.values()) > 0
    assert outcomes["read: a pair"] > 2 * MUTANTS / 3  # most of most mutants can still be used


def test_of_any_spoilt_table_or_folder_each_row_is_packed_or_listed_and_keeps_its_image(tmp_path: Path):
    outcomes: Counter[str] = Counter()
    for number in range(SOURCES):
        try:
            try_source(tmp_path, SEED, outcomes, number)
        except Exception as error:
            error.add_note(f"source {number}")
            raise
    told = ("packed", "rejected", "refused")
    assert {f"{kind}: {what}" for kind in KINDS_OF_SOURCES for what in told} <= outcomes.keys()
    assert min(outcomes[f"{kind}: rows left as they were"] for kind in ("csv", "tsv", "jsonl")) > SOURCES / 10


def test_the_oracle_finds_in_the_good_shards_what_they_were_made_of():
    for shard in shards():
        found, damaged = read_shard(shard.data)
        assert [sample.key.rpartition("/")[2].rstrip("x") for sample in found] == list(TAGS[:-1])
        assert not damaged
        contents = [content for sample in found for _, content in sample.members]
        assert contents == [content for _, content in shard.entries]


def test_a_shard_cut_anywhere_keeps_the_samples_that_another_follows_and_reports_one_more(tmp_path: Path):
    shard = shards()[0]
    keys = [name.rpartition(".")[0] for name, _ in shard.entries]
    stops = [start + -(-size // BLOCK) * BLOCK for start, size in shard.payloads]
    closed = [stop for i, stop in enumerate(stops) if i and keys[i] != keys[i - 1]] + [stops[-1] + BLOCK]
    for cut in range(0, len(shard.data), 61):
        (tmp_path / "a.tar").write_bytes(shard.data[:cut])
        source = open_bytes(str(tmp_path / "a.tar"), patience_s=1)
        faults = scan(source)[:, 2].tolist()
        source.close()
        whole = sum(stop <= cut for stop in closed)
        assert faults == [Fault.NONE] * whole + [Fault.DAMAGED] * (whole < len(closed))


def test_a_pickle_of_the_mutants_fires_where_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled())
    assert Path(FIRED).is_dir()


def test_a_sample_that_lost_a_member_under_a_run_is_not_read_without_it(tmp_path: Path, tokenizer_path: Path):
    corpus = make_corpus(tmp_path, tokenizer_path, (3,))
    manifest, _ = build_manifest([tmp_path / "00000.tar"], corpus.manifest, processes=1)
    _, stop, _ = np.load(manifest.index_path(0))[1]
    with (tmp_path / "00000.tar").open("r+b") as file:
        file.seek(stop - 2 * BLOCK)  # the header of its json
        file.write(bytes(BLOCK))
    with pytest.raises(DataError, match=r"00000\.tar from byte .* holds no sample \(a sample that ends early at byte"):
        ShardReader(manifest).read(0, 1)


def test_a_fault_that_came_under_a_run_stops_it_and_is_not_replaced(tmp_path: Path, tokenizer_path: Path):
    manifest = Manifest.load(make_corpus(tmp_path, tokenizer_path, (3,)).manifest)
    content = (tmp_path / "00000.tar").read_bytes()
    at = content.index(b"00001.jpg")
    header = sealed(content[at : at + BLOCK].replace(b".jpg", b".gif"))
    (tmp_path / "00000.tar").write_bytes(content[:at] + header + content[at + BLOCK :])
    with pytest.raises(DataError, match=r"00000\.tar from byte .* holds no sample \(00001: no image\): it has changed"):
        ShardReader(manifest).read(0, 1)


def test_json_beyond_its_bound_is_not_parsed(tmp_path: Path):
    brackets = b'{"caption": "red", "a": [' + b"[]," * 6_000_000 + b"0]}"
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "jpg": jpeg(0), "json": brackets}])
    with pytest.raises(DataError, match=r"1 x unreadable json"):
        build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", processes=1)


@pytest.mark.parametrize(
    "metadata",
    ['{"score": 1%s}' % ("0" * 400), '{"uid": "-%s-1"}' % ("f" * 15), '{"language": "\\ud800"}', '{"uid": "\\ud800"}'],
)
def test_no_number_or_text_in_json_stops_the_making_of_features(metadata: str, tmp_path: Path):
    write_shard(tmp_path / "a.tar", [{**member(0), "json": metadata.encode()}])
    source = open_bytes(str(tmp_path / "a.tar"), patience_s=1)
    (row,) = features(source, scan(source), FeatureFields("score", "language"))
    assert row["caption_characters"] == len(caption(0))
    assert np.isnan(row["score"])
    assert row["uid"].tolist() == [0, 0]


def test_a_key_that_breaks_lines_breaks_no_message(tmp_path: Path, tokenizer_path: Path):
    shard = tmp_path / "a.tar"
    write_shard(shard, [{"__key__": "two\nlines\x1b[2J", "txt": b"red"}])
    with pytest.raises(DataError, match=r"the first is two\\nlines\\x1b\[2J in .*a\.tar\)"):
        build_manifest([shard], tmp_path / "m.json", processes=1)
    with pytest.raises(DataError, match=r"the last was two\\nlines in shard"):
        BadSampleBudget(0, 0.0).add([BadSample("a.tar", "two\nlines", "no image")], 1)
    spoilt = make_corpus(
        tmp_path / "c", tokenizer_path, (4,), lambda i, sample: sample | {"__key__": f"{i}\n", "jpg": b"nothing"}
    )
    data = spoilt.training(global_batch=4, lanes=1)
    with pytest.raises(DataError, match=r"one is \d\\n in shard .*00000\.tar"):
        next(data.batches(data.initial_state()))
    with pytest.raises(DataError, match=r"Held-out sample 0\\n in shard .*00000\.tar"):
        next(spoilt.heldout().batches(4))


def test_shards_of_nothing_are_named(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(bytes(10 * BLOCK))
    with pytest.raises(DataError, match=r"in 1 shard \(they are empty; the first is .*a\.tar\)"):
        build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", processes=1)
