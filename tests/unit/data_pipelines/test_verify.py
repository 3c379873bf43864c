"""`verify` finds whatever training would stumble over, and `index --exclude` takes its list."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpus import Members, jpeg, make_corpus, member

from data_pipelines.__main__ import main
from data_pipelines.shards.index import build_manifest, count_from_stats
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.problems import CHANGED, MISSING, WRONG_COUNT, WRONG_INDEX, WRONG_SUM, Problem, advice
from data_pipelines.shards.writer import write_shard
from data_pipelines.tools.sources import name_sources
from data_pipelines.tools.verify import verify

SPOILED: dict[int, tuple[Members, str]] = {  # number of a sample -> what is changed, and the reason to be given
    3: ({"jpg": jpeg(3)[:300]}, "image cannot be decoded"),
    5: ({"jpg": b"GIF89a"}, "GIF is not supported"),
    6: ({"jpg": b"<html>"}, "image cannot be decoded: it is HTML"),
    8: ({"json": json.dumps({"captions": ["x" * 70_000]}).encode()}, "caption of 70,000 bytes is longer than 65,536"),
    9: ({"json": b'{"captions": ["cut'}, "json is not an object"),
}


def spoil(index: int, sample: Members) -> Members:
    return sample | SPOILED.get(index, ({}, ""))[0]


def problems_of(*names: Path, processes: int = 1) -> list[Problem]:
    return verify(name_sources([str(name) for name in names]), processes=processes).problems


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A manifest with checksums of two shards that have no problem."""
    folder = tmp_path / "sound"
    make_corpus(folder, folder, (6, 4))
    manifest, _ = build_manifest(sorted(folder.glob("*.tar")), folder / "manifest.json", checksums=True, processes=1)
    manifest.save()
    return folder / "manifest.json"


def test_a_sound_corpus_has_no_problem_and_the_exit_code_is_0(sound: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["verify", str(sound), "--processes", "1"]) == 0
    assert "10 samples in 2 shards: 0 problems" in capfd.readouterr().out
    assert (sound.parent / "manifest.problems.jsonl").read_text() == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_every_spoiled_sample_is_listed_in_order_with_its_shard_key_and_reason(tmp_path: Path, processes: int):
    corpus = make_corpus(tmp_path, tmp_path, (7, 5), spoil)
    found = problems_of(corpus.manifest, processes=processes)
    assert [problem.key for problem in found] == [f"{number:05d}" for number in SPOILED]
    assert [Path(problem.shard).name for problem in found] == ["00000.tar"] * 3 + ["00001.tar"] * 2
    for problem, (_, reason) in zip(found, SPOILED.values(), strict=True):
        assert problem.reason.startswith(reason)


def test_index_leaves_out_what_verify_listed_and_then_there_is_no_problem(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    corpus = make_corpus(tmp_path, tmp_path, (7, 5), spoil)
    assert main(["verify", str(corpus.manifest), "--processes", "1"]) == 4
    listing = tmp_path / "manifest.problems.jsonl"
    assert len(listing.read_text().splitlines()) == len(SPOILED)
    out = capfd.readouterr().out
    assert "12 samples in 2 shards: 5 problems" in out
    assert "image cannot be decoded: " in out
    index = ["index", str(tmp_path), "-o", str(corpus.manifest), "--exclude", str(listing), "--processes", "1"]
    assert main(index) == 0
    assert Manifest.load(corpus.manifest).samples == 7
    assert main(["verify", str(corpus.manifest), "--processes", "1"]) == 0


def test_shards_without_a_manifest_are_checked_for_whole_pairs_too(tmp_path: Path):
    twice = {"__key__": "twice", "jpg": jpeg(1), "JPG": jpeg(2), "txt": b"which?"}
    no_image, no_caption = {"__key__": "a", "txt": b"x"}, {"__key__": "b", "jpg": jpeg(0)}
    write_shard(tmp_path / "0.tar", [member(0), no_image, no_caption, twice, member(0)])
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:5000])
    assert [(Path(problem.shard).name, problem.key, problem.reason) for problem in problems_of(tmp_path)] == [
        ("0.tar", "a", "no image"),
        ("0.tar", "b", "no caption"),
        ("0.tar", "twice", "two members of one kind"),
        ("0.tar", "00000", "its key came before in the shard"),
        ("1.tar", "", "the shard is damaged or cut short here"),
    ]


def test_a_missing_shard_is_a_problem_and_the_others_are_still_read(sound: Path):
    (sound.parent / "00000.tar").unlink()
    verdict = verify(name_sources([str(sound)]), processes=1)
    assert [(Path(problem.shard).name, problem.key, problem.reason) for problem in verdict.problems] == [
        ("00000.tar", "", MISSING)
    ]
    assert "cannot be found" in verdict.problems[0].detail
    assert verdict.samples == 4


def test_a_shard_of_another_size_is_a_problem_with_both_sizes(sound: Path):
    shard = sound.parent / "00001.tar"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(bytes(512))
    (problem,) = problems_of(sound)
    assert (problem.key, problem.reason) == ("", CHANGED)
    assert problem.detail == f"{size + 512:,} bytes instead of {size:,} bytes"


def test_a_bit_that_flipped_where_no_decoder_looks_is_found_by_the_checksum(sound: Path):
    shard = sound.parent / "00001.tar"
    content = bytearray(shard.read_bytes())
    content[np.load(Manifest.load(sound).index_path(1))[1, 0] - 1] ^= 1  # in the padding of a member
    shard.write_bytes(content)
    (problem,) = problems_of(sound)
    assert (problem.key, problem.reason) == ("", WRONG_SUM)


def test_an_index_of_other_ranges_is_a_problem(sound: Path):
    path = Manifest.load(sound).index_path(0)
    rows = np.load(path)
    rows[1, 0] += 512
    np.save(path, rows)
    (problem,) = problems_of(sound)
    assert (problem.key, problem.reason) == ("", WRONG_INDEX)
    assert advice(problem.reason) == "index it again"
    assert main(["index", str(sound.parent), "-o", str(sound), "--processes", "1"]) == 0
    assert problems_of(sound) == []


def test_counts_that_their_maker_got_wrong_are_a_problem(sound: Path):
    shard = sound.parent / "00000.tar"
    (sound.parent / "00000_stats.json").write_text(json.dumps({"successes": 7}))
    count_from_stats([shard], sound.parent / "stats.json").save()
    (problem,) = problems_of(sound.parent / "stats.json")
    assert (problem.key, problem.reason, problem.detail) == ("", WRONG_COUNT, "6 instead of 7")


def test_parts_have_lists_of_their_own_that_add_up_to_the_whole(tmp_path: Path):
    corpus = make_corpus(tmp_path / "c", tmp_path, (4, 3, 5), spoil)
    whole = [json.loads(line) for line in _verified(corpus.manifest)]
    parts = [line for part in range(2) for line in _verified(corpus.manifest, part=part, count=2)]
    assert sorted(json.loads(line)["key"] for line in parts) == [problem["key"] for problem in whole]
    assert _verified(corpus.manifest, part=3, count=4) == []  # more parts than shards


def test_a_key_with_half_a_character_can_be_listed(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "txt": b"x"}])
    shutil.move(tmp_path / "a.tar", tmp_path / "\udcff.tar")
    assert main(["verify", str(tmp_path), "-o", str(tmp_path / "p.jsonl"), "--processes", "1"]) == 4
    assert json.loads((tmp_path / "p.jsonl").read_text())["reason"] == "no image"


def _verified(manifest: Path, part: int = 0, count: int = 1) -> list[str]:
    listing = manifest.with_name("list.jsonl")
    main(["verify", str(manifest), "-o", str(listing), "--shard", f"{part}/{count}", "--processes", "1"])
    if count > 1:
        listing = manifest.with_name(f"list.{part:05d}-of-{count:05d}.jsonl")
    return listing.read_text().splitlines()
