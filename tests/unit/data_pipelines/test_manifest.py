"""Manifests are made once, travel with their data, and tell what is wrong with a shard."""

import errno
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus import Corpus, caption, jpeg, make_corpus, member

from data_pipelines.errors import DataError
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest, write_atomically
from data_pipelines.shards.writer import write_shard
from data_pipelines.storage.files import expand
from data_pipelines.stream.reader import ShardReader


def test_a_manifest_is_what_was_saved(corpus: Corpus):
    manifest = Manifest.load(corpus.manifest)
    assert [shard.samples for shard in manifest.shards] == [70, 33, 1, 60]
    assert manifest.samples == 164
    assert all(shard.bytes == Path(shard.location).stat().st_size for shard in manifest.shards)


def test_a_corpus_can_be_moved_and_its_hash_stays(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.folder, tmp_path / "elsewhere")
    moved = Manifest.load(tmp_path / "elsewhere" / "manifest.json")
    assert moved.hash == Manifest.load(corpus.manifest).hash
    assert Path(moved.shards[0].location).is_relative_to(tmp_path)


def test_any_other_content_has_another_hash(corpus: Corpus):
    whole = Manifest.load(corpus.manifest)
    assert Manifest(whole.path, whole.shards[::-1]).hash != whole.hash
    assert Manifest(whole.path, whole.shards[:-1]).hash != whole.hash
    fewer = np.packbits([True] * 69 + [False])
    assert Manifest(whole.path, whole.shards[:1], kept_bits=fewer).hash != Manifest(whole.path, whole.shards[:1]).hash


def test_shards_outside_the_manifests_folder_keep_their_absolute_path(corpus: Corpus, tmp_path: Path):
    shards = expand([str(corpus.folder)])
    manifest, _ = build_manifest(shards, tmp_path / "m.json", processes=1)
    manifest.save()
    assert Manifest.load(tmp_path / "m.json") == manifest


def test_many_processes_index_as_one_does(corpus: Corpus, tmp_path: Path):
    shards = expand([str(corpus.folder)])
    seen = []
    parallel, _ = build_manifest(shards, tmp_path / "m.json", processes=2, on_shard=lambda: seen.append(1))
    one, _ = build_manifest(shards, tmp_path / "other" / "m.json", processes=1)
    assert parallel.shards == one.shards
    assert len(seen) == 4


def test_patterns_are_files_folders_globs_and_braces(corpus: Corpus):
    folder = corpus.folder
    everything = expand([str(folder)])
    assert [Path(name).name for name in everything] == [f"{i:05d}.tar" for i in range(4)]
    assert expand([f"{folder}/{{00000..00003}}.tar"]) == everything
    assert expand([f"{folder}/*.tar", f"{folder}/00001.tar"]) == everything
    with pytest.raises(DataError, match=r"No shards at .*9\.tar: give tar files"):
        expand([f"{folder}/9.tar"])


def test_samples_without_image_or_caption_are_left_out_and_reported(tmp_path: Path):
    shard = tmp_path / "a.tar"
    text, image = caption(0).encode(), jpeg(0)
    write_shard(
        shard,
        [
            {"__key__": "a", "jpg": image, "txt": text},
            {"__key__": "b", "txt": text},
            {"__key__": "c", "png": image},
            {"__key__": "d", "jpg": image, "txt": b""},
            {"__key__": "e", "webp": image, "json": b'{"caption": "from json"}'},
            {"__key__": "f", "jpg": image, "json": b'{"caption": null}'},
            {"__key__": "g", "jpg": image, "json": b"{"},
        ],
    )
    manifest, report = build_manifest([shard], tmp_path / "m.json", processes=1)
    assert manifest.samples == 2
    assert {(drop.key, drop.reason) for drop in report.faults} == {
        *(
            ("b", "no image"),
            ("c", "no caption"),
            ("d", "empty caption"),
            ("f", "no caption"),
            ("g", "unreadable json"),
        ),
    }
    assert {drop.shard for drop in report.faults} == {str(shard)}
    reader = ShardReader(manifest)
    assert [reader.read(0, index).caption() for index in range(2)] == [caption(0), "from json"]


def test_shards_with_nothing_usable_are_an_error_that_says_what_is_needed(tmp_path: Path):
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "gif": b"1", "txt": b"x"}])
    words = r"No usable sample in 1 shard \(1 x no image; the first is a in .*a\.tar\): a sample needs an image"
    with pytest.raises(DataError, match=words):
        build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", processes=1)


def test_a_truncated_shard_keeps_its_whole_samples_and_the_open_one_is_reported(corpus: Corpus, tmp_path: Path):
    shard = tmp_path / "cut.tar"
    shard.write_bytes((corpus.folder / "00000.tar").read_bytes()[:30_000])
    manifest, report = build_manifest([shard], tmp_path / "m.json", processes=1)
    (fault,) = report.faults
    assert (fault.key, fault.reason) == ("", "the shard is damaged or cut short here")
    start, stop, _ = np.load(manifest.index_path(0))[-1].tolist()
    end = f"; {stop - start:,} bytes from byte {start:,} on are lost, some 1 sample by the size of those before"
    assert re.fullmatch(r"the file ends inside a member of \d+ bytes at byte \d+" + re.escape(end), fault.detail)
    assert 0 < manifest.samples == manifest.shards[0].indexed - 1 < 70
    reader = ShardReader(manifest)
    assert [reader.read(0, i).caption() for i in range(manifest.samples)] == list(map(caption, range(manifest.samples)))


def test_what_is_no_tar_at_all_is_reported_as_damaged(corpus: Corpus, tmp_path: Path):
    (tmp_path / "junk.tar").write_bytes(b"<html>404</html>" * 100)
    manifest, report = build_manifest(
        [tmp_path / "junk.tar", corpus.folder / "00000.tar"], tmp_path / "m.json", processes=1
    )
    assert [shard.samples for shard in manifest.shards] == [0, 70]
    assert [Path(drop.shard).name for drop in report.faults] == ["junk.tar"]


def test_a_key_that_comes_back_later_in_a_shard_and_an_image_that_comes_twice_are_left_out(tmp_path: Path):
    twice = {"__key__": "twice", "jpg": jpeg(1), "JPG": jpeg(2), "txt": b"which?"}
    write_shard(tmp_path / "a.tar", [member(0), member(1), member(0), twice])
    manifest, report = build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", processes=1)
    assert manifest.samples == 2
    assert [(drop.key, drop.reason) for drop in report.faults] == [
        ("00000", "its key came before in the shard"),
        ("twice", "two members of one kind"),
    ]


def test_the_end_of_a_shard_ends_its_sample_even_where_the_next_begins_with_the_same_key(tmp_path: Path):
    # webdataset 1.0.2 joins the image of the first shard with the caption of the second here.
    first, second = tmp_path / "0.tar", tmp_path / "1.tar"
    write_shard(first, [{"__key__": "a", "jpg": jpeg(0)}])
    write_shard(second, [{"__key__": "a", "jpg": jpeg(1), "txt": b"of the second"}])
    manifest, report = build_manifest([first, second], tmp_path / "m.json", processes=1)
    assert [shard.samples for shard in manifest.shards] == [0, 1]
    assert [(drop.shard, drop.reason) for drop in report.faults] == [(str(first), "no caption")]
    assert ShardReader(manifest).read(1, 0).image == jpeg(1)


def test_a_missing_shard_is_named_with_the_fix(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.folder, tmp_path / "c")
    (tmp_path / "c" / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"00002\.tar is in the manifest but cannot be found: put it back"):
        Manifest.load(tmp_path / "c" / "manifest.json")


def test_a_shard_of_another_size_is_named_with_both_sizes_and_the_fix(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.folder, tmp_path / "c")
    with (tmp_path / "c" / "00002.tar").open("ab") as file:
        file.write(b"x")
    size = (corpus.folder / "00002.tar").stat().st_size
    with pytest.raises(DataError, match=rf"has {size + 1:,} bytes but had {size:,} when it was indexed: restore it"):
        ShardReader(Manifest.load(tmp_path / "c" / "manifest.json")).read(2, 0)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"format": 9, "shards": []}',
        '{"format": 2, "counts": "headers", "shards": [{"path": "a"}]}',
        '{"format": 2, "counts": "headers", "shards": [{"path": "a", "samples": -1, "bytes": 0}]}',
        '{"format": 2, "counts": "guesses", "shards": []}',
    ],
)
def test_what_is_no_manifest_is_said_to_be_none(content: str, tmp_path: Path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(DataError, match=r"m\.json is not a manifest of shards .*: write the manifest again"):
        Manifest.load(tmp_path / "m.json")


def test_a_missing_manifest_is_named_with_the_command_that_writes_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"no manifest at .*m\.json: write one with `python -m data_pipelines index"):
        Manifest.load(tmp_path / "m.json")


def test_a_folder_in_the_place_of_a_manifest_or_a_shard_is_named_with_the_fix(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"^Manifest .* cannot be opened \(Is a directory\): name a file, not a folder\.$"
    ):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match=r"^Shard .* cannot be opened \(Is a directory\): name a file, not a folder\.$"):
        build_manifest([tmp_path], tmp_path / "m.json", processes=1)


@pytest.mark.parametrize(
    ("code", "fix"), [(errno.EACCES, "see that you may read it"), (errno.EMFILE, "raise the limit")]
)
def test_a_shard_that_cannot_be_opened_is_named_with_the_fix(
    code: int, fix: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    reader = ShardReader(Manifest.load(corpus.manifest))
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(DataError, match=rf"^Shard .*00000\.tar cannot be opened \({os.strerror(code)}\): {fix}"):
        reader.read(0, 0)


def test_an_index_that_is_missing_or_does_not_fit_is_made_again(tmp_path: Path, tokenizer_path: Path):
    manifest = Manifest.load(make_corpus(tmp_path, tokenizer_path, (5,)).manifest)
    path = manifest.index_path(0)
    good = np.load(path)
    for content in (good[:3], good + 10**9, good[::-1], good.astype(np.int32), b"junk", None):
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        assert ShardReader(manifest).read(0, 4).caption() == caption(4)
        assert np.array_equal(np.load(path), good)


def test_a_folder_that_cannot_be_written_to_costs_no_more_than_a_scan(tmp_path: Path, tokenizer_path: Path):
    manifest = Manifest.load(make_corpus(tmp_path, tokenizer_path, (5,)).manifest)
    shutil.rmtree(manifest.index_path(0).parent)
    manifest.index_path(0).parent.write_text("a file in the place of the folder")
    assert ShardReader(manifest).read(0, 4).caption() == caption(4)


def test_a_manifest_that_cannot_be_written_says_where(corpus: Corpus, tmp_path: Path):
    (tmp_path / "file").touch()
    manifest = Manifest(tmp_path / "file" / "m.json", Manifest.load(corpus.manifest).shards)
    with pytest.raises(DataError, match=r"Cannot write .*m\.json \((Not a directory|File exists)\): name a"):
        manifest.save()


def test_whoever_writes_a_file_while_another_does_leaves_the_others_alone(tmp_path: Path):
    def slowly(tmp: Path) -> None:
        tmp.write_text("first, ")
        write_atomically(tmp_path / "m", lambda other: other.write_text("second"))  # as on another machine
        with tmp.open("a") as file:
            file.write("and whole")

    write_atomically(tmp_path / "m", slowly)
    assert (tmp_path / "m").read_text() == "first, and whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shard_whose_name_is_no_text_can_be_told_from_others(corpus: Corpus):
    shards = Manifest.load(corpus.manifest).shards
    named = [replace(shards[0], location=f"/data/{name}.tar") for name in ("\udcff", "\udcfe")]
    assert len({Manifest(corpus.manifest, (shard,)).hash for shard in named}) == 2


def test_a_manifest_is_json_that_people_can_read(corpus: Corpus):
    content = json.loads(corpus.manifest.read_text())
    assert content["shards"][1]["path"] == "00001.tar"
    with tarfile.open(corpus.folder / content["shards"][1]["path"]) as archive:
        assert len(archive.getnames()) == 3 * content["shards"][1]["samples"]
