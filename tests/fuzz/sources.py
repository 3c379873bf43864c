"""Tables and folders to pack, spoilt in many ways: every row is packed or listed, and no caption changes its image."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import Manifest
from data_pipelines.stream.reader import ShardReader
from data_pipelines.tools.pack import pack
from data_pipelines.tools.pairs import read_pairs
from fuzz.mutants import TAGS
from fuzz.trial import check_sentence

KINDS = ("csv", "tsv", "jsonl", "parquet", "folder")
COLUMNS = ("image", "caption", "captions", "score")
_TOKENS = (
    *(b'"', b'""', b',"', b'\t"', b'\n"', b'"', b'\t"a'),
    *(b",", b"\t", b"\n", b"\r", b"\r\n", b"\\", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"{", b"}", b"[", b"]", b"null", b"NaN", b"1e999", b"-Infinity", b"\\ud83d", b"\\u0000", b"x" * 70_000),
    *(b'"caption": 5, ', b"image", b"caption", b"/", b"..", b"https://", b"\n\n", b'",', b'\n"'),
    *("猫".encode(), "猫".encode("gbk")),
)  # fmt: skip
_GOOD = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_OTHER = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF"}


def try_source(folder: Path, seed: int, outcomes: Counter[str], number: int) -> None:
    """Packs one spoilt table or folder.

    Raises:
        AssertionError: A row was lost, or torn from its image, or what was said is no sentence.
    """
    rng = Random(f"{seed}-{number}")
    kind = KINDS[number % len(KINDS)]
    for name in ("source", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "source").mkdir()
    if kind == "folder":
        _try_folder(folder / "source", folder / "out", rng, outcomes)
    else:
        _try_table(folder / "source" / f"t.{kind}", folder / "out", rng, outcomes)


def _try_table(table: Path, out: Path, rng: Random, outcomes: Counter[str]) -> None:
    for tag in TAGS:
        (table.parent / f"{tag}.jpg").write_bytes(_image("JPEG", tag))
    kind = table.suffix[1:]
    good = _table(kind)
    content = spoilt(good, rng)
    table.write_bytes(content)
    packed = _pack(table, out, outcomes)
    if packed is None or kind == "parquet":
        return
    total, captions = packed
    text = content.decode("utf-8-sig")
    if "\r" in text or (kind == "csv" and text.count('"') > 1):  # the lines of a cell in quotes are no rows
        return
    header = "" if kind == "jsonl" else good.decode().split("\n")[0]
    lines = [line for line in text.split("\n") if line.strip(" " * (kind == "jsonl"))]
    assert total == len(lines) - bool(header)
    if header and '"' not in text:
        separator = "," if kind == "csv" else "\t"
        widths = [line.count(separator) for line in lines]
        told = sum(" field" in line and "the header " in line for line in (out / "rejected.jsonl").open())
        assert told == len(widths) - widths.count(widths[0])
    if header in ("", lines[0]):
        for line in {*good.decode().split("\n")[:-1]} & {*lines} - {header}:
            assert "a picture of " + next(tag for tag in TAGS if tag in line) in captions
            outcomes[f"{kind}: rows left as they were"] += 1


def _try_folder(source: Path, out: Path, rng: Random, outcomes: Counter[str]) -> None:
    wanted: dict[str, str] = {}  # captions by the file that must be packed
    images = 0
    for number in range(rng.randint(1, 9)):
        place = source / rng.choice(("", "deep", "deep/er", "Deep.d"))
        place.mkdir(parents=True, exist_ok=True)
        stem = f"{rng.choice(('a', 'b.c', 'é', 'x y', '.hidden'))}{number}"
        extension = rng.choice((".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".dat", ""))
        image = place / (stem + extension if extension else stem.replace(".c", ""))
        kind = rng.choice((*_GOOD, *_OTHER, "text", "nothing", "broken"))
        content = {"text": b"<html>not found</html>", "nothing": b"", "broken": _image("JPEG", TAGS[0])[:200]}.get(kind)
        image.write_bytes(content if content is not None else _image((_GOOD | _OTHER)[kind], TAGS[number % 4]))
        caption = rng.choice((f"a picture {number}", f"一只猫坐在沙发上 {number}", f"café {number}", "", " "))
        encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "gbk", "latin-1"))
        text = caption.encode(encoding, errors="ignore")
        if has_text := rng.random() < 0.9:
            image.with_suffix(rng.choice((".txt", ".TXT", ".Txt"))).write_bytes(text)
        if stem.startswith("."):
            continue
        images += kind in (*_GOOD, *_OTHER, "broken") or extension not in (".dat", "")
        readable = encoding.startswith("utf") or text.isascii()
        if kind in _GOOD and has_text and readable and caption.strip():
            decoding = encoding if encoding.startswith("utf") else "ascii"
            wanted[image.relative_to(source).as_posix()] = text.decode(decoding).strip()
    packed = _pack(source, out, outcomes)
    if packed is None:
        assert not wanted
        return
    total, _ = packed
    assert total == images
    found = {str(sample.metadata()["file"]): sample for sample in _samples(out)}
    assert {name: sample.caption() for name, sample in found.items()} == wanted
    assert all(sample.image == (source / name).read_bytes() for name, sample in found.items())
    outcomes["folder: images packed"] += len(found)


def _pack(source: Path, out: Path, outcomes: Counter[str]) -> tuple[int, list[str]] | None:
    """The number of rows and the captions packed; None where the source is refused as a whole."""
    kind = source.suffix[1:] or "folder"
    try:
        pairs = read_pairs(source, "image", "caption")
        pack(pairs, out, samples_per_shard=99)  # one shard, scanned in this process
    except DataError as error:
        check_sentence(error, source)
        assert not out.exists()
        outcomes[f"{kind}: refused"] += 1
        return None
    rejected = [json.loads(line, parse_constant=_refuse) for line in (out / "rejected.jsonl").read_text().splitlines()]
    samples = _samples(out)
    rows = [int(sample.key) for sample in samples] + [line["row"] for line in rejected]
    assert sorted(rows) == list(range(1, pairs.total + 1))
    assert all(line["reason"].isprintable() and len(json.dumps(line)) < 2000 for line in rejected)
    for sample in samples:
        json.loads(sample.json or b"", parse_constant=_refuse)
    outcomes[f"{kind}: packed"] += len(samples)
    outcomes[f"{kind}: rejected"] += len(rejected)
    return pairs.total, [sample.caption() for sample in samples]


def _samples(out: Path) -> list:
    manifest = Manifest.load(out / "manifest.json")
    reader = ShardReader(manifest)
    samples = [reader.read(shard, i) for shard, entry in enumerate(manifest.shards) for i in range(entry.samples)]
    reader.close()
    return samples


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@cache
def _image(kind: str, tag: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), f"#{tag[-6:]}").save(out, kind)
    return out.getvalue()


@cache
def _table(kind: str) -> bytes:
    rows = [
        {"image": f"{tag}.jpg", "caption": f"a picture of {tag}", "captions": [tag], "score": number / 10}
        for number, tag in enumerate(TAGS)
    ]
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
        return out.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
    writer.writerows([COLUMNS, *([*row.values()] for row in rows)])
    return text.getvalue().encode()


def spoilt(data: bytes, rng: Random) -> bytes:
    """One to four pieces put in, replaced, left out or repeated, bits flipped, or the end cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        to = min(to, at + rng.choice((1, 8, 64, 4096)))
        match rng.randrange(6):
            case 0:
                data = data[:at] + rng.choice(_TOKENS) + data[at:]
            case 1:
                data = data[:at] + rng.choice(_TOKENS) + data[to:]
            case 2:
                data = data[:at] + data[to:]
            case 3:
                data = data[:to] + data[at:to] + data[to:]
            case 4:
                data = data[:at]
            case _ if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data
