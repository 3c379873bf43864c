"""`reshard` changes the order of samples and nothing else, in parts, after interruptions, and for any reader."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from corpus import Members, jpeg, make_corpus, member

from data_pipelines.__main__ import main
from data_pipelines.errors import DataError
from data_pipelines.shards.filters import Filters
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Sample
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.reader import ShardReader
from data_pipelines.tools.reshard import Resharding
from data_pipelines.tools.sources import Part, load_sources

Content = tuple[bytes, bytes | None, bytes | None]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", tmp_path, (9, 5, 1, 8)).manifest


def reshard(*arguments: object) -> int:
    return main(["reshard", *map(str, arguments), "--processes", "1"])


def samples_of(manifest: Path) -> Iterator[Sample]:
    found = Manifest.load(manifest)
    reader = ShardReader(found)
    for shard, entry in enumerate(found.shards):
        yield from (reader.read(shard, index) for index in range(entry.samples))


def contents(manifest: Path) -> list[Content]:
    return [(sample.image, sample.text, sample.json) for sample in samples_of(manifest)]


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_the_samples_are_the_same_in_another_order_and_in_shards_of_one_size(manifest: Path, tmp_path: Path):
    assert reshard(manifest, "-o", tmp_path / "new", "--samples-per-shard", 6) == 0
    before, after = contents(manifest), contents(tmp_path / "new" / "manifest.json")
    assert [shard.samples for shard in Manifest.load(tmp_path / "new" / "manifest.json").shards] == [6, 6, 6, 5]
    assert Counter(before) == Counter(after)
    assert before != after


def test_all_samples_are_shuffled_and_not_only_those_of_a_shard(manifest: Path, tmp_path: Path):
    reshard(manifest, "-o", tmp_path / "new", "--samples-per-shard", 8)
    source_of = {content: number for number, content in enumerate(contents(manifest))}
    first = [source_of[content] for content in contents(tmp_path / "new" / "manifest.json")][:8]
    assert len({place // 9 for place in first}) > 1
    assert first != sorted(first)


def test_one_seed_gives_the_same_bytes_and_two_seeds_another_order(manifest: Path, tmp_path: Path):
    for name, seed, processes in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        arguments = ["reshard", str(manifest), "-o", str(tmp_path / name), "--samples-per-shard", "6"]
        assert main([*arguments, "--seed", str(seed), "--processes", str(processes)]) == 0
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") != shards_of(tmp_path / "c")
    assert Counter(contents(tmp_path / "a" / "manifest.json")) == Counter(contents(tmp_path / "c" / "manifest.json"))


def test_parts_write_together_what_one_writes_alone(manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    reshard(manifest, "-o", tmp_path / "whole", "--samples-per-shard", 4)
    capfd.readouterr()
    for part in (2, 0, 1):
        assert reshard(manifest, "-o", tmp_path / "parts", "--samples-per-shard", 4, "--shard", f"{part}/3") == 0
        assert f"python -m data_pipelines index {tmp_path / 'parts'} -o" in capfd.readouterr().out
    assert not (tmp_path / "parts" / "manifest.json").exists()
    assert shards_of(tmp_path / "parts") == shards_of(tmp_path / "whole")


def test_webdataset_reads_the_result(manifest: Path, tmp_path: Path):
    import webdataset

    reshard(manifest, "-o", tmp_path / "new", "--samples-per-shard", 6)
    shards = [str(path) for path in sorted((tmp_path / "new").glob("*.tar"))]
    read = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    assert [(row["jpg"], row["txt"], row["json"]) for row in read] == contents(tmp_path / "new" / "manifest.json")


def test_members_of_any_kind_stay_as_they_are(tmp_path: Path):
    samples: list[Members] = [member(i) | {"mask.png": bytes([i] * 700), "npy": b"\x93"} for i in range(5)]
    samples[2] = {"__key__": "folder/2", "webp": jpeg(2), "json": b'{"caption": "in json"}'}
    write_shard(tmp_path / "a.tar", samples)
    reshard(tmp_path / "a.tar", "-o", tmp_path / "new", "--samples-per-shard", 5)
    import webdataset

    read = webdataset.WebDataset(str(tmp_path / "new" / "00000.tar"), shardshuffle=False, empty_check=False)
    found = {row["__key__"]: {name: row[name] for name in row if not name.startswith("__")} for row in read}
    assert found == {
        str(sample["__key__"]): {name: value for name, value in sample.items() if name != "__key__"}
        for sample in samples
    }


def test_only_what_a_manifest_keeps_is_written(manifest: Path, tmp_path: Path):
    kept, _ = build_manifest(
        sorted((tmp_path / "corpus").glob("*.tar")),
        tmp_path / "kept.json",
        filters=Filters(caption_characters=(30, 1000)),
        processes=1,
    )
    kept.save()
    assert 0 < kept.samples < 23
    reshard(tmp_path / "kept.json", "-o", tmp_path / "new", "--samples-per-shard", 6)
    after = [sample.caption() for sample in samples_of(tmp_path / "new" / "manifest.json")]
    assert len(after) == kept.samples
    assert min(map(len, after)) >= 30


def test_shards_without_a_manifest_give_what_their_manifest_gives(manifest: Path, tmp_path: Path):
    reshard(manifest, "-o", tmp_path / "a", "--samples-per-shard", 6)
    reshard(manifest.parent, "-o", tmp_path / "b", "--samples-per-shard", 6)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def test_keys_that_several_sources_use_are_told_apart_and_others_stay(tmp_path: Path):
    for name, first in (("a", 0), ("b", 100)):
        samples = [member(first + number) | {"__key__": f"{number:05d}"} for number in range(3)]
        write_shard(tmp_path / f"{name}.tar", [*samples, member(first + 50)])
    write_shard(tmp_path / "c.tar", [member(7) | {"__key__": "00001-00002"}])  # looks like a key with a number
    reshard(tmp_path, "-o", tmp_path / "new", "--samples-per-shard", 9)
    keys = [sample.key for sample in samples_of(tmp_path / "new" / "manifest.json")]
    assert len(keys) == len(set(keys)) == 9
    reshard(tmp_path / "a.tar", tmp_path / "b.tar", "-o", tmp_path / "two", "--samples-per-shard", 8)
    keys = [sample.key for sample in samples_of(tmp_path / "two" / "manifest.json")]
    assert sorted(keys) == [
        *(f"{source:05d}-{number:05d}" for source in range(2) for number in range(3)),
        "00050",
        "00150",
    ]


def test_an_interrupted_run_goes_on_and_keeps_the_shards_that_are_whole(manifest: Path, tmp_path: Path):
    job = Resharding(tuple(load_sources([str(manifest)], tmp_path)), tmp_path / "new", 4, 0)
    job.start()

    class InterruptionError(Exception):
        pass

    def interrupt() -> None:
        if len(shards_of(job.folder)) == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        job.write(processes=1, on_shard=interrupt)
    kept = shards_of(job.folder)
    times = {name: (job.folder / name).stat().st_mtime_ns for name in kept}
    left = job.folder / ".00002.tar.123.tmp"  # of a process that was killed
    left.write_bytes(b"half a shard")
    job.start()
    assert job.write(processes=1) == 4
    assert not left.exists()
    assert {name: (job.folder / name).stat().st_mtime_ns for name in kept} == times
    reshard(manifest, "-o", tmp_path / "whole", "--samples-per-shard", 4)
    assert shards_of(job.folder) == shards_of(tmp_path / "whole")


def test_a_shard_that_cannot_be_written_leaves_nothing_of_it(manifest: Path, tmp_path: Path, monkeypatch):
    job = Resharding(tuple(load_sources([str(manifest)], tmp_path)), tmp_path / "new", 4, 0)
    job.start()

    def full(path: Path, samples: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("data_pipelines.tools.reshard.write_shard", full)
    with pytest.raises(DataError, match=r"^Cannot write .*00000\.tar \(No space left on device\): free some space"):
        job.write(processes=1)
    assert [path.name for path in job.folder.iterdir()] == ["reshard.json"]


def test_a_folder_of_another_resharding_or_of_other_shards_is_refused(
    manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert reshard(manifest, "-o", tmp_path / "new", "--samples-per-shard", 6) == 0
    capfd.readouterr()
    other = make_corpus(tmp_path / "other", tmp_path, (9, 5, 1, 8), lambda _, m: m | {"txt": b"other"}).manifest
    for arguments in ([manifest, "--seed", 1], [manifest, "--samples-per-shard", 7], [other]):
        assert reshard(*arguments, "-o", tmp_path / "new", *([] if 7 in arguments else ["--samples-per-shard", 6])) == 4
        assert "was begun with other sources, another --seed or --samples-per-shard" in capfd.readouterr().err
    assert reshard(manifest, "-o", manifest.parent) == 4
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"{manifest.parent} holds shards that `reshard` did not write: name a new folder."
    assert not (manifest.parent / "reshard.json").exists()


def test_as_many_other_samples_of_the_same_shards_are_another_resharding(manifest: Path, tmp_path: Path):
    shards, listing = sorted(manifest.parent.glob("*.tar")), tmp_path / "x.jsonl"
    for key, code in (("00001", 0), ("00002", 4)):
        listing.write_text(json.dumps({"shard": "00000.tar", "key": key}))
        kept, _ = build_manifest(shards, tmp_path / "m.json", filters=Filters(exclude=listing), processes=1)
        kept.save()
        assert reshard(tmp_path / "m.json", "-o", tmp_path / "new") == code


def test_a_shard_that_changed_since_it_was_indexed_is_named_with_the_fix(manifest: Path, tmp_path: Path):
    path = manifest.parent / "00001.tar"
    content = bytearray(path.read_bytes())
    rows = np.load(Manifest.load(manifest).index_path(1))
    content[rows[2, 0]] ^= 0xFF  # the first letter of a header
    path.write_bytes(content)
    job = Resharding(tuple(load_sources([str(manifest)], tmp_path)), tmp_path / "new", 4, 0)
    job.start()
    with pytest.raises(DataError, match=rf"Shard {path} holds 2 samples but the manifest counts 5.*write the man"):
        job.write(processes=1)


@pytest.mark.parametrize("text", ["3/3", "-1/3", "0/0", "1", "a/b", "1/2/3", ""])
def test_what_is_no_part_is_refused_in_one_sentence(text: str):
    with pytest.raises(DataError, match=r"^--shard .* is no part: write NUMBER/COUNT with numbers from 0, such as 0/8"):
        Part.parse(text)


def test_a_part_that_there_is_not_is_refused_by_every_command(manifest: Path, capfd: pytest.CaptureFixture[str]):
    for command, part in product(("verify", "stats", "reshard"), ("4/4", "")):  # "" as of a variable that is not set
        assert main([command, str(manifest), "-o", str(manifest.parent / "x"), "--shard", part]) == 4
        assert capfd.readouterr().err.startswith(f"--shard {part} is no part")


def test_the_record_says_what_was_resharded(manifest: Path, tmp_path: Path):
    reshard(manifest, "-o", tmp_path / "new", "--samples-per-shard", 6, "--seed", 3)
    record = json.loads((tmp_path / "new" / "reshard.json").read_text())
    assert (record["samples"], record["samples_per_shard"], record["seed"]) == (23, 6, 3)
