"""One function decides what the captions of a sample are: scan, filters, `verify`, `stats` and training agree."""

import json
from pathlib import Path

import pytest
from corpus import jpeg

from data_pipelines.errors import DataError
from data_pipelines.shards.filters import Filters
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.sample import Fault
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.reader import ShardReader
from data_pipelines.tools.sources import name_sources
from data_pipelines.tools.verify import verify

TXT, OTHER = b"a dog", "ein Hund"
CASES: dict[str, tuple[bytes | None, object, list[str]]] = {  # .txt, .json, captions
    "txt": (TXT, None, ["a dog"]),
    "utf-16 txt": ("a dog".encode("utf-16"), None, ["a dog"]),
    "txt and another field": (TXT, {"title": OTHER}, ["a dog"]),
    "txt beats caption": (TXT, {"caption": OTHER}, ["a dog"]),
    "captions beat txt": (TXT, {"captions": [OTHER, " a cat "]}, [OTHER, "a cat"]),
    "captions alone": (None, {"captions": [OTHER]}, [OTHER]),
    "caption alone": (None, {"caption": OTHER}, [OTHER]),
    "caption beside an empty txt": (b"", {"caption": OTHER}, [OTHER]),
    "caption beside a blank txt": (b" \n", {"caption": OTHER}, [OTHER]),
    "an empty list says nothing": (TXT, {"captions": []}, ["a dog"]),
    "blank texts say nothing": (TXT, {"captions": ["", " "]}, ["a dog"]),
    "objects say nothing": (TXT, {"captions": [{"text": OTHER, "lang": "de"}]}, ["a dog"]),
    "numbers say nothing": (TXT, {"captions": [1, None, [OTHER]]}, ["a dog"]),
    "a text is no list": (TXT, {"captions": OTHER}, ["a dog"]),
    "an object is no list": (TXT, {"captions": {"raw": OTHER}}, ["a dog"]),
    "texts among others": (TXT, {"captions": [1, OTHER, {}]}, [OTHER]),
    "an empty list, and caption": (None, {"captions": [], "caption": OTHER}, [OTHER]),
    "an empty list, an empty txt, and caption": (b"", {"captions": [], "caption": OTHER}, [OTHER]),
    "nothing": (None, None, []),
    "an empty list alone": (None, {"captions": []}, []),
    "an empty list and an empty txt": (b"", {"captions": []}, []),
    "objects alone": (None, {"captions": [{"text": OTHER}]}, []),
    "a number": (None, {"caption": 5}, []),
    "a blank": (None, {"caption": " "}, []),
    "a blank txt": (b" \n\t", None, []),
    "a blank txt and an empty list": (b" \n", {"captions": []}, []),
    "a txt that is no UTF-8": (b"caf\xe9", None, []),
    "a txt that is no UTF-8, and caption": (b"caf\xe9", {"caption": OTHER}, []),
    "captions beside a txt that is no UTF-8": (b"caf\xe9", {"captions": [OTHER]}, [OTHER]),
    "a txt with null bytes": (b"a\0b", None, []),
    "a txt beyond its bound": (b"x" * 70_000, None, []),
    "unreadable json and an empty txt": (b"", b"{", []),
    "captions with a null byte": (None, {"captions": ["a\0b"]}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_scan_filters_verify_and_training_agree_on_the_captions_of_a_sample(case: str, tmp_path: Path):
    text, content, captions = CASES[case]
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    members = {"jpg": jpeg(1)} | ({"txt": text} if text is not None else {}) | ({"json": raw} if content else {})
    good = {"__key__": "good", "jpg": jpeg(0), "txt": TXT}
    write_shard(tmp_path / "a.tar", [good, {"__key__": "odd", **members}])
    for filters in (Filters(), Filters(caption_characters=(1, 99))):
        manifest, report = build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", filters=filters, processes=1)
        assert manifest.samples == (2 if captions else 1)
        assert [drop.key for drop in report.faults] == ([] if captions else ["odd"])
    problems = verify(name_sources([str(tmp_path / "a.tar")]), processes=1).problems
    assert [problem.key for problem in problems] == ([] if captions else ["odd"])
    if captions:
        manifest.save()
        assert list(ShardReader(manifest).read(0, 1).captions()) == captions


def test_why_a_sample_says_nothing_is_told(tmp_path: Path):
    found = {
        (None, b'{"captions": []}'): Fault.NO_CAPTION,
        (b"", b'{"captions": []}'): Fault.EMPTY_CAPTION,
        (b"", b"{"): Fault.BAD_JSON,
        (None, b"[]"): Fault.BAD_JSON,
        (None, b'{"caption": "' + b"x" * 70_000 + b'"}'): Fault.BAD_CAPTION,
    }
    for (text, content), fault in found.items():
        members = {"__key__": "a", "jpg": jpeg(0), "json": content} | ({"txt": text} if text is not None else {})
        write_shard(tmp_path / "a.tar", [members])
        with pytest.raises(DataError, match=f"1 x {fault.reason}; the first is a in"):
            build_manifest([tmp_path / "a.tar"], tmp_path / "m.json", processes=1)
