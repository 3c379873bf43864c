"""`index` keeps exactly the samples that were asked for, says why it left out the others, and reads nothing twice."""

import json
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from corpus import Corpus, Members, caption, jpeg, make_corpus, member
from pyarrow import parquet

from data_pipelines.__main__ import main
from data_pipelines.errors import DataError, SampleError
from data_pipelines.shards.filters import Filters
from data_pipelines.shards.index import Report, build_manifest, count_from_stats
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.problems import Problem, write_problems
from data_pipelines.shards.sample import hash64
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.reader import ShardReader
from data_pipelines.tools.sources import name_sources
from data_pipelines.tools.verify import verify

UIDS = [f"{number:032x}" for number in (1, 2**64, 2**127 + 5, 7)]


def sample(key: str, *, height: int = 40, width: int = 40, text: str = "a cat", **metadata: object) -> Members:
    image = jpeg(sum(key.encode()), height, width)
    return {"__key__": key, "jpg": image, "txt": text.encode(), "json": json.dumps(metadata).encode()}


def index(folder: Path, shards: Sequence[Sequence[Members]] = (), **filters: object) -> tuple[Manifest, Report]:
    for number, samples in enumerate(shards):
        write_shard(folder / f"{number}.tar", samples)
    made = Filters(**filters)  # pyright: ignore
    manifest, report = build_manifest(sorted(folder.glob("*.tar")), folder / "m.json", filters=made, processes=1)
    manifest.save()
    return Manifest.load(folder / "m.json"), report


def keys(manifest: Manifest) -> str:
    reader = ShardReader(manifest)
    places = [(shard, i) for shard, entry in enumerate(manifest.shards) for i in range(entry.samples)]
    return "".join(reader.read(*place).key for place in places)


MIXED = [
    [sample("a", height=30, width=90, lang="en", score=0.5, uid=UIDS[0]), sample("b", lang="zh", score=0.2)],
    [sample("c", height=20, text="a", score=0.3, uid=UIDS[1]), sample("d", text="x" * 30, lang="en", uid=UIDS[2])],
    [sample("e", lang=5, score="high", uid="no uid"), sample("f", height=41, lang="de", score=1, uid=UIDS[3])],
]


@pytest.mark.parametrize(
    ("filters", "kept", "reasons"),
    [
        ({}, "abcdef", {}),
        ({"min_size": 40}, "bdef", {"shorter side below 40 pixels": 2}),
        ({"max_aspect": 2.0}, "bcdef", {"aspect above 2": 1}),
        ({"max_aspect": 1.5}, "bdef", {"aspect above 1.5": 2}),
        ({"caption_characters": (2, 29)}, "abef", {"caption not of 2 to 29 characters": 2}),
        ({"caption_characters": (1, 30)}, "abcdef", {}),
        ({"language": ("lang", frozenset({"en", "zh"}))}, "abd", {"lang not en or zh": 3}),
        ({"min_score": ("score", 0.3)}, "acf", {"score below 0.3": 1, "score missing or no number": 2}),
        (
            {"min_size": 40, "language": ("lang", frozenset({"en"}))},
            "d",
            {"shorter side below 40 pixels": 2, "lang not en": 3},  # c would fail both
        ),
        (
            {"min_size": 40, "min_score": ("score", 0.3)},
            "f",
            {"shorter side below 40 pixels": 2, "score below 0.3": 1, "score missing or no number": 2},
        ),
    ],
)
def test_each_filter_keeps_exactly_the_right_samples_and_counts_the_others_by_their_first_reason(
    tmp_path: Path, filters: dict[str, object], kept: str, reasons: dict[str, int]
):
    manifest, report = index(tmp_path, MIXED, **filters)
    assert keys(manifest) == kept
    assert report.filtered == reasons
    assert manifest.samples == len(kept)


@pytest.mark.parametrize(("min_size", "max_aspect"), [(1, 0.0), (0, 99.0), (40, 2.0)])
def test_a_size_that_is_unknown_is_a_reason_of_its_own_and_stray_bytes_hide_none(
    tmp_path: Path, min_size: int, max_aspect: float
):
    whole = sample("a")
    image = whole["jpg"]
    assert isinstance(image, bytes)
    stray = sample("b") | {"jpg": image[:20] + b"\0\0" + image[20:]}
    manifest, report = index(
        tmp_path, [[whole, stray, sample("c") | {"jpg": b"junk"}]], min_size=min_size, max_aspect=max_aspect
    )
    assert keys(manifest) == "ab"
    assert report.filtered == {"size of the image unknown": 1}


@pytest.mark.parametrize(
    ("score", "least", "reason"),
    [
        *((score, 0.3, None) for score in ("0.31", " 0.31 ", "3.1e-1", "+.31", 1, 0.3)),
        *((score, 0.3, "score below 0.3") for score in ("0.29", "-5", 0, -1e308)),
        *((score, -9, "score missing or no number") for score in ("", "high", "0,31", "1_0", "nan", "inf", "1e999")),
        *((score, -9, "score missing or no number") for score in (None, True, [0.5], float("nan"), float("inf"))),
        (10**400, -9, "score missing or no number"),
    ],
)
def test_a_numeric_string_is_a_score_and_what_is_none_is_not_called_low(
    tmp_path: Path, score: object, least: float, reason: str | None
):
    samples = [[sample("good", score=1), sample("a", score=score)]]
    manifest, report = index(tmp_path, samples, min_score=("score", least))
    assert manifest.samples == (1 if reason else 2)
    assert report.filtered == ({reason: 1} if reason else {})


def test_the_uids_of_a_datacomp_list_are_kept_and_no_others(tmp_path: Path):
    wanted = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in (UIDS[3], UIDS[1])]
    np.save(tmp_path / "uids.npy", np.array(wanted, dtype="u8,u8"))
    manifest, report = index(tmp_path, MIXED, uids=tmp_path / "uids.npy")
    assert keys(manifest) == "cf"
    assert report.filtered == {"uid not in uids.npy": 4}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.zeros(3), r"uids\.npy has the dtype float64, not u8,u8: give a list of uids as DataComp has\.$"),
        (
            None,
            r"uids\.npy cannot be read as a \.npy \(FileNotFoundError: .*\): give a list of uids as DataComp has\.$",
        ),
        (b"", r"uids\.npy cannot be read as a \.npy \(ValueError: .*\): give"),
        (b"PK\3\4, as an .npz begins", r"uids\.npy cannot be read as a \.npy \(ValueError: .*\): give"),
    ],
)
def test_what_is_no_list_of_uids_is_refused_in_one_sentence(
    tmp_path: Path, content: np.ndarray | bytes | None, sentence: str
):
    if isinstance(content, bytes):
        (tmp_path / "uids.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "uids.npy", content)
    with pytest.raises(DataError, match=sentence):
        index(tmp_path, MIXED, uids=tmp_path / "uids.npy")


@pytest.mark.parametrize(
    ("unique", "kept", "reasons"),
    [
        ({"image"}, "abd", {"image seen before": 2}),
        ({"caption"}, "abe", {"caption seen before": 2}),
        ({"pair"}, "abde", {"pair seen before": 1}),
        ({"image", "caption"}, "ab", {"caption seen before": 2, "image seen before": 1}),
    ],
)
def test_the_first_of_equal_images_captions_or_pairs_is_kept_over_all_shards(
    tmp_path: Path, unique: set[str], kept: str, reasons: dict[str, int]
):
    one, two = jpeg(1), jpeg(2)
    first: list[Members] = [
        {"__key__": "a", "jpg": one, "txt": b"a cat"},
        {"__key__": "b", "jpg": two, "txt": b"a dog"},
    ]
    second: list[Members] = [
        {"__key__": "c", "jpg": one, "txt": b" A  Cat"},  # case and white space do not count
        {"__key__": "d", "jpg": jpeg(3), "txt": b"a dog"},
        {"__key__": "e", "jpg": two, "txt": b"a bird"},
    ]
    manifest, report = index(tmp_path, [first, second], unique=frozenset(unique))
    assert keys(manifest) == kept
    assert report.filtered == reasons


def test_a_sample_that_a_filter_left_out_is_no_first_of_equals(tmp_path: Path):
    small, large = sample("a", height=10, text="same"), sample("b", height=50, text="same")
    assert keys(index(tmp_path, [[small], [large]], min_size=40, unique=frozenset({"caption"}))[0]) == "b"


def test_bad_samples_that_a_run_listed_are_left_out_by_the_name_of_their_shard_and_their_key(tmp_path: Path):
    listing = tmp_path / "bad_samples.jsonl"
    rows = [
        {"shard": "/elsewhere/0.tar", "key": "b", "step": 3, "reason": "image cannot be decoded"},
        {"shard": "s3://bucket/2.tar", "key": "e", "step": 3, "reason": "x"},
        {"shard": "/elsewhere/1.tar", "key": "a", "reason": "another shard's"},
        {"shard": "/elsewhere/1.tar", "key": "", "reason": "a whole shard, as `verify` lists it"},
    ]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, report = index(tmp_path, MIXED, exclude=listing)
    assert keys(manifest) == "af"
    assert report.filtered == {"on the list of excluded samples": 2}
    assert report.left_out == [str(tmp_path / "1.tar")]


def test_of_shards_with_one_name_the_one_that_is_listed_loses_a_sample_whatever_its_key_holds(tmp_path: Path):
    key = "a\u2028b\x85c"  # both end a line for str.splitlines, and json writes them as they are
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", [sample(key), sample("d")])
    shards, listing = sorted(tmp_path.rglob("*.tar")), tmp_path / "problems.jsonl"
    write_problems(listing, [Problem(str(shards[1]), key, "image cannot be decoded")])
    manifest, _ = build_manifest(shards, tmp_path / "m.json", filters=Filters(exclude=listing), processes=1)
    assert [shard.samples for shard in manifest.shards] == [2, 1]


@pytest.mark.parametrize("line", ["{", "[]", '{"shard": "a"}', '{"shard": 1, "key": "a"}'])
def test_a_list_that_is_none_is_refused_in_one_sentence(tmp_path: Path, line: str):
    (tmp_path / "list.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"list\.jsonl has a line that is no object with `shard` and `key`: give a"):
        index(tmp_path, MIXED, exclude=tmp_path / "list.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl cannot be opened \(No such file or directory\)"):
        index(tmp_path, MIXED, exclude=tmp_path / "none.jsonl")


def test_other_thresholds_scan_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, report = index(tmp_path, MIXED, min_size=40)
    assert report.reused == 0

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was read again")

    monkeypatch.setattr("data_pipelines.shards.index.open_bytes", refuse)
    second, report = index(tmp_path, min_size=20, caption_characters=(2, 100))
    assert report.reused == 3
    assert (keys_of_bits(first), keys_of_bits(second)) == ("bdef", "abdef")


def keys_of_bits(manifest: Manifest) -> str:
    letters = np.array(list("abcdef")).reshape(3, 2)
    kept = [manifest.kept(shard) for shard in range(3)]
    return "".join("".join(row if rows is None else row[rows]) for row, rows in zip(letters, kept, strict=True))


def test_another_json_field_is_read_anew(tmp_path: Path):
    index(tmp_path, MIXED, min_score=("score", 0.3))
    with pytest.raises(
        DataError, match=r"No usable sample in 3 shards \(6 x other missing or no number; .*: let the f"
    ):
        index(tmp_path, min_score=("other", 0.3))


def test_a_shard_that_changed_is_scanned_again_and_only_that(tmp_path: Path):
    index(tmp_path, MIXED, min_size=40)
    same_size = [sample("c", height=50, text="a", score=0.3, uid=UIDS[1]), MIXED[1][1]]
    write_shard(tmp_path / "1.tar", same_size)
    later = (tmp_path / "1.tar").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "1.tar", ns=(later, later))
    manifest, report = index(tmp_path, min_size=40)
    assert report.reused == 2
    assert keys(manifest) == "bcdef"


def test_nothing_that_was_read_of_a_shard_outlives_a_change_of_it(tmp_path: Path):
    score = Filters(min_score=("score", 0.4))
    for number, samples in enumerate(MIXED):
        write_shard(tmp_path / f"{number}.tar", samples)
    shards, path = sorted(tmp_path.glob("*.tar")), tmp_path / "m.json"
    before, _ = build_manifest(shards, path, filters=score, checksums=True, processes=1)
    size = shards[1].stat().st_size
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 1))  # clocks of files tick every few milliseconds only
    write_shard(shards[1], [sample("c", height=20, text="a", score=0.9, uid=UIDS[1]), MIXED[1][1]])
    assert shards[1].stat().st_size == size
    build_manifest(shards, path, processes=1)  # scans it again, and neither describes nor sums it
    after, _ = build_manifest(shards, path, filters=score, checksums=True, processes=1)
    assert [shard.samples for shard in before.shards] == [1, 0, 1]
    assert [shard.samples for shard in after.shards] == [1, 1, 1]
    assert [shard.sha256 for shard in after.shards] == [sha256(shard.read_bytes()).hexdigest() for shard in shards]


def test_unreadable_captions_in_json_are_left_out_whenever_json_is_read_and_no_index_changes_by_it(
    tmp_path: Path,
):
    shards: list[list[Members]] = [[sample("a"), sample("b") | {"json": b'{"captions": ["cut'}, sample("c")]]
    unique = frozenset({"image"})
    first, report = index(tmp_path, shards, unique=unique)
    assert [(drop.key, drop.reason) for drop in report.faults] == [("b", "unreadable caption")]
    assert keys(first) == "ac"
    assert keys(index(tmp_path)[0]) == "abc"  # reads no json beside a good .txt, whatever was read before
    again, report = index(tmp_path, unique=unique)
    assert [drop.key for drop in report.faults] == ["b"]
    assert again.hash == first.hash
    assert report.reused == 1
    assert verify(name_sources([str(again.path)]), processes=1).problems == []


def test_an_interrupted_index_goes_on_where_it_was(tmp_path: Path):
    index(tmp_path, MIXED)
    Manifest.load(tmp_path / "m.json").index_path(1).unlink()
    assert index(tmp_path)[1].reused == 2


@pytest.mark.parametrize("trust", [True, False])
def test_a_key_that_came_before_in_its_shard_is_not_read_whoever_counted(tmp_path: Path, trust: bool):
    write_shard(tmp_path / "0.tar", [sample("a"), sample("b"), sample("a", text="another")])
    (tmp_path / "0_stats.json").write_text('{"successes": 3}')
    made = count_from_stats([tmp_path / "0.tar"], tmp_path / "m.json") if trust else index(tmp_path)[0]
    outcomes = ShardReader(made).read_all([0] * made.samples, range(made.samples))
    told = [str(found) if isinstance(found, SampleError) else found.key for found in outcomes]
    assert told == ["a", "b", *(["its key came before in the shard"] if trust else [])]
    assert [found.key for found in outcomes[2:]] == ["a"] * trust


def test_the_hash_differs_when_other_samples_are_kept(tmp_path: Path):
    hashes = {
        index(tmp_path, MIXED, **filters)[0].hash for filters in ({}, {"min_size": 40}, {"caption_characters": (2, 29)})
    }
    assert len(hashes) == 3  # the last two keep as many
    assert index(tmp_path, min_size=40)[0].hash in hashes


def test_bits_of_another_manifest_are_refused_with_the_fix(tmp_path: Path):
    index(tmp_path, MIXED, min_size=40)
    bits = np.load(tmp_path / "m.keep.npy")
    np.save(tmp_path / "m.keep.npy", ~bits)
    with pytest.raises(DataError, match=r"m\.keep\.npy is not the one that .*m\.json was written with: write the man"):
        Manifest.load(tmp_path / "m.json")


def test_a_worker_that_would_start_after_the_manifest_was_filtered_anew_is_refused(tmp_path: Path):
    before, _ = index(tmp_path, MIXED, min_size=40)
    assert keys(pickle.loads(pickle.dumps(before))) == "bdef"
    index(tmp_path, caption_characters=(2, 29))  # keeps as many
    with pytest.raises(DataError, match=r"m\.keep\.npy is not the one that .*m\.json was written with: write the man"):
        pickle.dumps(before)


def test_training_on_a_filtered_manifest_reads_only_what_is_kept(tmp_path: Path, tokenizer_path: Path):
    corpus = make_corpus(tmp_path, tokenizer_path, (30, 20))
    filters = Filters(caption_characters=(30, 1000))
    manifest, _ = build_manifest(sorted(tmp_path.glob("*.tar")), corpus.manifest, filters=filters, processes=1)
    manifest.save()
    expected = {int(hash64(jpeg(number), "<i8")) for number in range(50) if len(caption(number)) >= 30}
    assert 8 < len(expected) < 42
    data = corpus.training(global_batch=4, lanes=1)
    batches = data.batches(data.initial_state())
    epoch = [image for _ in range(len(expected) // 4) for image in next(batches).tensors["image_ids"].tolist()]
    assert len(set(epoch)) == len(epoch) > len(expected) - 4
    assert set(epoch) <= expected


def img2dataset(folder: Path, *, with_json: bool = True) -> list[int]:
    """Two shards as img2dataset writes them, and the numbers of their usable samples. One .txt is empty."""
    counts = []
    for shard in range(2):
        samples = [member(10 * shard + i) | {"__key__": f"{shard:05d}{i:04d}"} for i in range(9)]
        if shard:
            samples[4] |= {"txt": b""}
        write_shard(folder / f"{shard:05d}.tar", samples)
        rows = [
            {"key": str(row["__key__"]), "caption": "x", "status": "success", "error_message": None} for row in samples
        ]
        rows.append({"key": "x", "caption": "y", "status": "failed_to_download", "error_message": "404"})
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        stats = {"count": 10, "successes": 9, "failed_to_download": 1, "status_dict": {"success": 9}}
        if with_json:
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        counts.append(9 - shard)
    return counts


@pytest.mark.parametrize("trust", [False, True])
def test_a_folder_of_img2dataset_trains_without_conversion(
    tmp_path: Path, tokenizer_path: Path, trust: bool, capfd: pytest.CaptureFixture[str]
):
    usable = img2dataset(tmp_path)
    arguments = ["index", str(tmp_path), "-o", str(tmp_path / "manifest.json"), "--processes", "1"]
    assert main([*arguments, "--trust-stats"] if trust else arguments) == 0
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert [shard.samples for shard in manifest.shards] == ([9, 9] if trust else usable)
    assert ("as their makers counted" in capfd.readouterr().out) == trust
    data = Corpus(tmp_path, tokenizer_path).training(global_batch=8, lanes=1)
    batches = data.batches(data.initial_state())
    seen = [next(batches) for _ in range(4)]  # two epochs of 16 or 18 samples
    bad = [problem for batch in seen for problem in batch.bad]
    assert {problem.key for problem in bad} == ({"000010004"} if trust else set())
    assert all(len(batch.tensors["positions"]) == 8 for batch in seen)


@pytest.mark.parametrize("with_json", [True, False])
def test_counts_come_from_the_stats_or_else_from_the_parquet(tmp_path: Path, with_json: bool):
    img2dataset(tmp_path, with_json=with_json)
    seen: list[int] = []
    manifest = count_from_stats(sorted(tmp_path.glob("*.tar")), tmp_path / "m.json", on_shard=lambda: seen.append(1))
    assert [shard.samples for shard in manifest.shards] == [9, 9]
    assert manifest.counts == "stats"
    assert not (tmp_path / "m.index").exists()  # no tar was read
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("", b"", r"Beside .*0\.tar there is neither 0_stats\.json nor \.parquet: index it without --trust-stats"),
        ("0_stats.json", b"{}", r"0_stats\.json does not say how many samples .*0\.tar holds \(KeyError\): index it"),
        ("0.parquet", b"junk", r"0\.parquet does not say how many samples .*0\.tar holds \(ArrowInvalid\): index it"),
    ],
)
def test_counts_that_cannot_be_read_are_refused_with_the_fix(tmp_path: Path, name: str, content: bytes, sentence: str):
    write_shard(tmp_path / "0.tar", MIXED[0])
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        count_from_stats([tmp_path / "0.tar"], tmp_path / "m.json")


def test_reasons_are_counted_over_all_processes_alike(tmp_path: Path):
    _, one = index(tmp_path, MIXED, min_size=40, unique=frozenset({"caption"}))
    shards = sorted(tmp_path.glob("*.tar"))
    filters = Filters(min_size=40, unique=frozenset({"caption"}))
    two_manifest, two = build_manifest(shards, tmp_path / "other" / "m.json", filters=filters, processes=2)
    assert two.filtered == one.filtered != Counter()
    assert keys(two_manifest) == "bd"
