"""What `index` keeps is of the very file that lies there, and what it says of a bad one is the cause and the fix."""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from corpus import Members, caption, jpeg, member
from rich.console import Console

from data_pipelines.__main__ import main
from data_pipelines.errors import DataError, MissingError, SampleError
from data_pipelines.shards.filters import Filters
from data_pipelines.shards.index import build_manifest, count_from_stats
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.problems import REPLACED, Problem, write_problems
from data_pipelines.shards.writer import write_shard
from data_pipelines.storage.cache import ShardCache
from data_pipelines.stream.reader import ShardReader
from data_pipelines.tools.console import progress_bar
from data_pipelines.tools.sources import load_sources, name_sources
from data_pipelines.tools.verify import verify
from http_server import ShardServer


def scored(score: float, *, reverse: bool = False, count: int = 6) -> list[Members]:
    order = range(count - 1, -1, -1) if reverse else range(count)
    return [member(number) | {"json": json.dumps({"score": score}).encode()} for number in order]


def shard_bytes(samples: list[Members], folder: Path) -> bytes:
    write_shard(folder / "made", samples)
    content = (folder / "made").read_bytes()
    (folder / "made").unlink()
    return content


def index(folder: Path, *arguments: object) -> int:
    return main(["index", str(folder), "-o", str(folder / "m.json"), "--processes", "1", *map(str, arguments)])


def keys(manifest: Path) -> list[str]:
    loaded = Manifest.load(manifest)
    reader = ShardReader(loaded)
    return [reader.read(0, number).key for number in range(loaded.shards[0].samples)]


# A cache is of this very file --------------------------------------------------------------------------------


def rsynced(path: Path, content: bytes) -> None:
    """As `rsync -a` brings it: a new file in the old one's place, with a time of long ago."""
    path.with_suffix(".new").write_bytes(content)
    os.utime(path.with_suffix(".new"), (1_700_000_000, 1_700_000_000))
    path.with_suffix(".new").replace(path)


def copied(path: Path, content: bytes) -> None:
    """As `cp -p` brings it: other bytes in the same file, with a time of long ago."""
    path.write_bytes(content)
    os.utime(path, (1_700_000_000, 1_700_000_000))


def same_time(path: Path, content: bytes) -> None:
    """As two builds that give all files one time."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


REPLACING = [rsynced, copied, same_time]


@pytest.mark.parametrize("replace", REPLACING)
def test_a_shard_replaced_by_one_of_equal_size_is_scanned_described_and_summed_again(
    replace: Callable[[Path, bytes], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    low, high = (shard_bytes(scored(score, reverse=score > 0.3), tmp_path) for score in (0.25, 0.35))
    assert len(low) == len(high)
    shard, manifest = tmp_path / "0.tar", tmp_path / "m.json"
    shard.write_bytes(low)
    assert index(tmp_path, "--min-score", "score=0.2", "--checksums") == 0
    replace(shard, high)
    assert index(tmp_path) == 0
    assert "scanned before" not in capfd.readouterr().out
    assert keys(manifest) == [f"{number:05d}" for number in range(5, -1, -1)]
    assert index(tmp_path, "--min-score", "score=0.3") == 0
    assert Manifest.load(manifest).samples == 6
    assert index(tmp_path, "--checksums") == 0
    assert Manifest.load(manifest).shards[0].sha256 == sha256(high).hexdigest()
    assert index(tmp_path, "--min-score", "score=0.3") == 0
    assert "1 of these shards had been scanned before" in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("replace", REPLACING)
def test_tools_that_meet_a_replaced_shard_say_so_and_indexing_it_again_is_the_way_out(
    replace: Callable[[Path, bytes], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    shard, manifest = tmp_path / "0.tar", tmp_path / "m.json"
    old = [member(number) for number in range(6)]
    new = [member(number) | {"jpg": jpeg(number, 20, 16) + bytes(3000)} for number in range(5)]
    content = shard_bytes(new, tmp_path)
    shard.write_bytes(shard_bytes(old, tmp_path).ljust(len(content), b"\0"))
    assert index(tmp_path) == 0
    replace(shard, content.ljust(shard.stat().st_size, b"\0"))
    commands = (["stats", manifest, "-o", tmp_path / "s.json"], ["reshard", manifest, "-o", tmp_path / "new"])
    for command in commands:
        assert main([*map(str, command), "--processes", "1"]) == 4
        assert "has changed; restore it, or write the manifest again" in capfd.readouterr().err
    assert main(["verify", str(manifest), "--processes", "1"]) == 4
    with pytest.raises(DataError, match=r"write the manifest again with `.* index`\.$"):
        keys(manifest)
    assert index(tmp_path) == 0
    shutil.rmtree(tmp_path / "new")  # which was begun with the other shard
    for command in commands:
        assert main([*map(str, command), "--processes", "1"]) == 0
    assert len(keys(manifest)) == 5


def test_a_corpus_that_was_copied_is_read_by_its_manifest_as_before(tmp_path: Path):
    (tmp_path / "a").mkdir()
    write_shard(tmp_path / "a" / "0.tar", scored(0.5))
    assert index(tmp_path / "a") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # with times of its own
    shutil.rmtree(tmp_path / "a")
    assert len(keys(tmp_path / "b" / "m.json")) == 6
    assert main(["stats", str(tmp_path / "b" / "m.json"), "-o", str(tmp_path / "s.json"), "--processes", "1"]) == 0


@pytest.mark.parametrize("spoil", ["rows", "features", "seal", "junk"])
def test_a_file_of_the_index_that_is_not_what_was_written_is_made_anew(spoil: str, tmp_path: Path):
    write_shard(tmp_path / "0.tar", scored(0.5))
    assert index(tmp_path, "--min-score", "score=0.3") == 0
    rows = Manifest.load(tmp_path / "m.json").index_path(0)
    path = {"features": next(rows.parent.glob("*.features-*")), "seal": rows.with_suffix(".seal.json")}.get(spoil, rows)
    good = rows.read_bytes()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(b"junk" if spoil == "junk" else content)
    assert index(tmp_path, "--min-score", "score=0.3") == 0
    assert rows.read_bytes() == good
    assert Manifest.load(tmp_path / "m.json").samples == 6


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ShardServer()
    yield server
    server.stop()


def remote_index(url: str, folder: Path, **options: object) -> Manifest:
    manifest, _ = build_manifest([url], folder / "m.json", processes=1, **options)  # pyright: ignore
    manifest.save()
    return manifest


@pytest.mark.parametrize("has_etags", [True, False])
def test_of_a_remote_shard_only_what_has_its_version_is_used_again(
    has_etags: bool, tmp_path: Path, server: ShardServer
):
    server.has_etags = has_etags
    low, high = (shard_bytes(scored(score, reverse=score > 0.3), tmp_path) for score in (0.25, 0.35))
    filters = Filters(min_score=("score", 0.3))
    url = server.put("0.tar", low)
    with pytest.raises(DataError, match="6 x score below 0.3"):
        remote_index(url, tmp_path, filters=filters)
    server.put("0.tar", high)
    manifest = remote_index(url, tmp_path, filters=filters)
    assert manifest.samples == 6
    assert np.array_equal(np.load(manifest.index_path(0)), remote_rows(url, tmp_path / "other"))


def remote_rows(url: str, folder: Path) -> np.ndarray:
    return np.load(remote_index(url, folder).index_path(0))


def test_a_nodes_cache_never_serves_a_remote_shard_that_was_replaced(tmp_path: Path, server: ShardServer):
    server.has_etags = False  # so that nothing but the bytes tells
    cache = ShardCache(tmp_path / "cache", 10**7, 2)
    for score in (0.25, 0.35):
        content = shard_bytes(scored(score, reverse=score > 0.3), tmp_path)
        (shard,) = remote_index(server.put("0.tar", content), tmp_path).shards
        assert cache.fetch(shard.location, shard.bytes, shard.version, shard.sha256).read_bytes() == content


def test_a_nodes_cache_takes_a_shard_from_mirrors_by_its_checksum(tmp_path: Path, server: ShardServer, monkeypatch):
    monkeypatch.setattr("data_pipelines.storage.cache.CHUNK", 4096)
    content = shard_bytes(scored(0.5), tmp_path)
    url = server.put("0.tar", content)
    server.etags.extend("BABABABABABA")
    cache = ShardCache(tmp_path / "cache", 10**7, 2)
    assert cache.fetch(url, len(content), "A", sha256(content).hexdigest()).read_bytes() == content


# Checksums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [["--checksums"], [None], [None, "--checksums"]])
@pytest.mark.parametrize("replace", REPLACING)
def test_a_shard_that_is_not_what_its_checksum_says_is_never_taken_for_right_without_a_word(
    steps: list[str | None], replace: Callable[[Path, bytes], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    shard = tmp_path / "0.tar"
    shard.write_bytes(shard_bytes(scored(0.25), tmp_path))
    assert index(tmp_path, "--checksums") == 0
    content = shard_bytes(scored(0.35), tmp_path)
    replace(shard, content)
    (problem,) = verify(name_sources([str(tmp_path / "m.json")]), processes=1).problems
    assert problem.reason == "the SHA-256 of the shard is not the manifest's"
    capfd.readouterr()
    said = ""
    for step in steps:
        assert index(tmp_path, *([step] if step else [])) == 0
        said += capfd.readouterr().err
    assert said.count(f"{shard}: {REPLACED} ({sha256(content).hexdigest()} instead of ") == 1
    assert "restore it, unless it was replaced on purpose" in said


def test_a_bit_that_flips_on_the_disk_stays_a_problem_however_often_the_shard_is_indexed(tmp_path: Path):
    # Neither its size nor its times tell, so that the sum that was taken once still stands.
    shard = tmp_path / "0.tar"
    write_shard(shard, scored(0.25))
    assert index(tmp_path, "--checksums") == 0
    known = Manifest.load(tmp_path / "m.json").shards[0].sha256
    (tmp_path / "0_stats.json").write_text('{"successes": 6}')
    for again in ([], ["--trust-stats"], ["--checksums"]):
        assert index(tmp_path, *again) == 0
        assert Manifest.load(tmp_path / "m.json").shards[0].sha256 == known


def test_strict_makes_a_replaced_or_damaged_shard_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    shard = tmp_path / "0.tar"
    write_shard(shard, scored(0.25))
    assert index(tmp_path, "--strict", "--checksums") == 0
    before = (tmp_path / "m.json").read_bytes()
    good = shard.read_bytes()
    for content in (shard_bytes(scored(0.35), tmp_path), good[:9000], good + b"x" * 600, gzip.compress(good)):
        rsynced(shard, content)
        write_shard(tmp_path / "1.tar", [member(9)])
        capfd.readouterr()
        assert index(tmp_path, "--strict") == 4
        error = capfd.readouterr().err
        assert "of 2 are not whole or not what they were, listed in" in error
        assert str(shard) in error
        assert (tmp_path / "m.json").read_bytes() == before
        assert str(shard) in (tmp_path / "m.dropped.jsonl").read_text()


# Shards that are missing, and the list of exclusions ---------------------------------------------------------


def test_all_gaps_of_remote_shards_are_told_at_once_and_what_was_scanned_is_kept(tmp_path: Path, server: ShardServer):
    for number in (0, 2):
        server.put(f"{number}.tar", shard_bytes(scored(0.5), tmp_path))
    urls = [f"{server.url}/{number}.tar" for number in range(5)]
    gaps = ", ".join(urls[number] for number in (1, 3, 4))
    for build in (build_manifest, count_from_stats):
        for number in (0, 2):
            server.put(f"{number}_stats.json", b'{"successes": 6}')
        with pytest.raises(MissingError) as caught:
            build(urls, tmp_path / "m.json")
        assert str(caught.value) == f"3 of 5 shards cannot be found: {gaps}. Put them back, or name the others alone."
    _, report = build_manifest([urls[0], urls[2]], tmp_path / "m.json", processes=1)
    assert report.reused == 2


def test_an_entry_for_a_whole_shard_leaves_out_the_shard_even_where_it_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", scored(0.5))
    assert index(tmp_path, "--checksums") == 0
    rsynced(tmp_path / "1.tar", shard_bytes(scored(0.4), tmp_path))
    assert main(["verify", str(tmp_path / "m.json"), "--processes", "1"]) == 4
    out = capfd.readouterr().out
    assert "indexing it again would take what it holds now for right" in out
    assert "as a whole each shard that it lists without a key" in out
    listing = tmp_path / "m.problems.jsonl"
    shards = [str(tmp_path / f"{number}.tar") for number in range(3)]
    (tmp_path / "1.tar").unlink()  # it may even be gone by now
    manifest, report = build_manifest(shards, tmp_path / "m.json", filters=Filters(exclude=listing), processes=1)
    manifest.save()
    assert [Path(shard.location).name for shard in manifest.shards] == ["0.tar", "2.tar"]
    assert report.left_out == shards[1:2]
    assert main(["verify", str(tmp_path / "m.json"), "--processes", "1"]) == 0


def test_of_moved_shards_with_one_name_the_one_whose_folders_are_alike_is_left_out(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", scored(0.5))
    write_problems(
        tmp_path / "list.jsonl", [Problem("/elsewhere/two/0.tar", "", "x"), Problem("/a/one/0.tar", "00003", "y")]
    )
    filters = Filters(exclude=tmp_path / "list.jsonl")
    manifest, report = build_manifest(
        sorted(tmp_path.rglob("*.tar")), tmp_path / "m.json", filters=filters, processes=1
    )
    assert [(Path(shard.location).parent.name, shard.samples) for shard in manifest.shards] == [("one", 5)]
    assert report.unmatched == []


def test_entries_that_are_not_in_these_shards_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_shard(tmp_path / "0.tar", scored(0.5))
    entries = [("0.tar", "00001"), ("0.tar", "nobody"), ("/x/9.tar", "00001"), ("/x/8.tar", "")]
    write_problems(tmp_path / "list.jsonl", [Problem(shard, key, "x") for shard, key in entries])
    assert index(tmp_path, "--exclude", tmp_path / "list.jsonl") == 0
    error = capfd.readouterr().err
    assert (
        f"3 of the entries of {tmp_path / 'list.jsonl'} are not in these shards; the first is 00001 in /x/9.tar"
        in error
    )
    assert Manifest.load(tmp_path / "m.json").samples == 5


def test_a_list_of_every_shard_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_shard(tmp_path / "0.tar", scored(0.5))
    write_problems(tmp_path / "list.jsonl", [Problem("0.tar", "", "x")])
    assert index(tmp_path, "--exclude", tmp_path / "list.jsonl") == 4
    assert "list.jsonl lists as a whole all that are named (1 shard): name others." in capfd.readouterr().err


# One truth about a damaged shard -----------------------------------------------------------------------------


def test_index_verify_stats_and_inspect_have_one_number_for_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    sound = shard_bytes([member(number) for number in range(40)], tmp_path)
    flipped = bytearray(sound)
    flipped[len(sound) // 2 :: 512] = b"x" * len(flipped[len(sound) // 2 :: 512])
    contents = [sound, sound[:50_000], bytes(flipped), b"<html>404</html>" * 99, sound + b"rest" * 200]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.tar").write_bytes(content)
    (tmp_path / "1_stats.json").write_text('{"successes": 40}')
    assert index(tmp_path) == 0
    error = capfd.readouterr().err
    whole = [shard.samples for shard in Manifest.load(tmp_path / "m.json").shards]
    assert whole[0] == whole[4] == 40
    assert whole[3] == 0
    assert 0 < whole[1] < 40 > whole[2] > 0
    assert "1.tar: the shard is damaged or cut short here (the file ends inside a " in error
    assert f", {40 - whole[1]} samples by the count of its maker)" in error
    assert ", some " in error
    assert "3.tar: the file is no tar (a web page or XML, most often an error page" in error
    assert "4.tar: bytes that are no tar follow the end of the archive (800 bytes from byte" in error
    for source in (tmp_path / "m.json", tmp_path):
        assert main(["verify", str(source), "-o", str(tmp_path / "p.jsonl"), "--processes", "1"]) == 4
        assert "4 problems" in capfd.readouterr().out
        listed = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
        assert [(Path(row["shard"]).name, row["key"]) for row in listed] == [(f"{n}.tar", "") for n in range(1, 5)]
    dropped = [json.loads(line) for line in (tmp_path / "m.dropped.jsonl").read_text().splitlines()]
    assert [row["shard"] for row in dropped] == [row["shard"] for row in listed]
    for limit in ([], ["--sample", "3"]):
        stats = ["stats", str(tmp_path / "m.json"), "-o", str(tmp_path / "s.json"), "--processes", "1", *limit]
        assert main(stats) == 0
        assert sum(json.loads((tmp_path / "s.json").read_text())["unusable"].values()) == 4
    sources = load_sources([str(tmp_path / "m.json")], tmp_path, processes=1)
    assert sum(source.entry.samples for source in sources if source.entry) == sum(whole)


def test_damage_that_is_read_all_the_same_has_a_place_and_no_name_of_a_whole_shard(tmp_path: Path):
    (tmp_path / "0.tar").write_bytes(shard_bytes(scored(0.5), tmp_path)[:9000])
    (tmp_path / "0_stats.json").write_text('{"successes": 3}')
    manifest = count_from_stats([tmp_path / "0.tar"], tmp_path / "m.json")
    found = ShardReader(manifest).read_all([0], [2])[0]
    assert isinstance(found, SampleError)
    assert (str(found), found.key) == ("the shard is damaged or cut short here", "byte 7,168")


# Causes and fixes --------------------------------------------------------------------------------------------


def tar_of(names: list[str], *, links: tuple[str, ...] = (), kind: bytes = tarfile.LNKTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            content = jpeg(number) if name.endswith(".jpg") else b'{"a": 1}' if name.endswith("json") else b"a caption"
            info.size = len(content)
            if name in links:
                info.type, info.linkname, info.size = kind, names[0], 0
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


PAIRS = ["a.jpg", "a.txt", "b.jpg", "b.txt"]
APART, DOT, LINK = "its members do not lie together", "a dot in its key", "a link in the place of a file"
CAUSES: dict[str, tuple[bytes, int, list[str]]] = {  # a shard, its usable samples, and what is said of the others
    "unsorted": (tar_of(PAIRS[::2] + PAIRS[1::2]), 0, [f"4 x {APART}", "must be neighbours", "--sort=name"]),
    "json apart": (tar_of([*PAIRS, "a.json", "b.json"]), 2, [APART, "--sort=name"]),
    "captions first": (tar_of(PAIRS[1::2] + PAIRS[::2]), 0, [f"4 x {APART}"]),
    "dots": (tar_of(["v_2.0.jpg", "v_2.0.txt", "v_2.1.jpg"]), 0, [DOT, "a key ends at the first dot"]),
    "dots in part": (tar_of([*PAIRS, "c.1.jpg", "c.1.txt"]), 2, [DOT, "ends at the first dot"]),
    "dotted caption": (tar_of([*PAIRS, "c.jpg", "c.en.txt"]), 2, [DOT]),
    "hard link": (tar_of([*PAIRS, "c.jpg", "c.txt"], links=("c.jpg",)), 2, [LINK, "--hard-dereference"]),
    "symbolic link": (tar_of([*PAIRS, "c.jpg", "c.txt"], links=("c.txt",), kind=tarfile.SYMTYPE), 2, [LINK]),
    "a link too many": (tar_of([*PAIRS, "b.json"], links=("b.json",)), 2, []),
    "whole twice": (tar_of([*PAIRS, *PAIRS]), 2, ["its key came before in the shard", "a key of its own"]),
    "twice in a tar each": (tar_of(PAIRS) + tar_of(PAIRS), 2, ["its key came before in the shard"]),
    "gzip": (gzip.compress(tar_of(PAIRS)), 0, ["the file is no tar", "compressed with gzip: unpack it"]),
    "no image": (tar_of(["a.txt", "b.txt"]), 0, ["2 x no image", "a sample needs an image (jpg, jpeg, png, webp)"]),
    "empty": (bytes(10240), 0, ["they are empty", "a sample needs an image"]),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named_with_what_helps_against_it(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    content, samples, words = CAUSES[name]
    (tmp_path / "0.tar").write_bytes(content)
    assert index(tmp_path) == (0 if samples else 4)
    error = capfd.readouterr().err
    for word in words:
        assert word in error
    assert bool(error) == bool(words)
    if samples:
        assert Manifest.load(tmp_path / "m.json").samples == samples
        bad = verify(name_sources([str(tmp_path)]), processes=1).problems
        dropped = tmp_path / "m.dropped.jsonl"
        assert len(bad) == (len(dropped.read_text().splitlines()) if dropped.exists() else 0)


def test_joined_tars_are_one_shard_to_index_verify_stats_and_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    parts = [shard_bytes([member(number)], tmp_path) for number in range(3)]
    (tmp_path / "0.tar").write_bytes(parts[0] + bytes(10240) + parts[1] + parts[2])
    assert index(tmp_path) == 0
    reader = ShardReader(Manifest.load(tmp_path / "m.json"))
    assert [reader.read(0, number).caption() for number in range(3)] == [caption(number) for number in range(3)]
    for source in (tmp_path / "m.json", tmp_path):
        assert main(["verify", str(source), "-o", str(tmp_path / "p.jsonl"), "--processes", "1"]) == 0
        assert main(["stats", str(source), "-o", str(tmp_path / "s.json"), "--processes", "1"]) == 0
        assert json.loads((tmp_path / "s.json").read_text())["samples"] == 3


def test_verify_says_when_there_was_no_checksum_to_compare_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_shard(tmp_path / "0.tar", [*scored(0.5), {"__key__": "x", "txt": b"no image"}])
    assert index(tmp_path) == 0
    capfd.readouterr()
    assert main(["verify", str(tmp_path / "m.json"), "--processes", "1"]) == 0
    out = capfd.readouterr().out
    assert "6 samples in 1 shard: 0 problems" in out
    assert "1 sample that the manifest leaves out were not read" in out
    assert "1 shard without a checksum to compare with: what still decodes is taken as right" in out
    assert index(tmp_path, "--checksums") == 0
    capfd.readouterr()
    assert main(["verify", str(tmp_path / "m.json"), "--processes", "1"]) == 0
    assert "without a checksum" not in capfd.readouterr().out


def test_a_sparse_member_is_told_by_name_and_byte_and_costs_one_sample(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    content = bytearray(tar_of([*PAIRS, "c.jpg", "c.npy", "c.txt"]))
    at = content.index(b"c.npy")
    content[at + 156 : at + 157] = tarfile.GNUTYPE_SPARSE
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    (tmp_path / "0.tar").write_bytes(content)
    assert index(tmp_path) == 0
    assert Manifest.load(tmp_path / "m.json").samples == 2
    error = capfd.readouterr().err
    assert f"c in {tmp_path / '0.tar'}: a sparse member (c.npy is a sparse member at byte {at})" in error
    assert "make the shard again by `tar` without --sparse" in error


def test_a_bar_is_gone_before_the_reason_is_told(monkeypatch: pytest.MonkeyPatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=60)
    monkeypatch.setattr("data_pipelines.tools.console.ERR", shown)

    def work(end: type[Exception] | None) -> str:
        shown.file = io.StringIO()
        with suppress(DataError), progress_bar("reading", 3, "shards") as advance:
            advance()
            if end:
                raise end("told")
        return shown.file.getvalue()

    assert "1/3" in work(None).rpartition("\x1b[2K")[2]
    assert "1/3" not in work(DataError).rpartition("\x1b[2K")[2]
