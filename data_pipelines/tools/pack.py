"""Packs pairs of images and captions into shards."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

from data_pipelines.errors import DataError, SampleError
from data_pipelines.samples.decode import check_image
from data_pipelines.shards.header import FORMATS, image_format, read_header
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Sample, hash64
from data_pipelines.shards.tar import MAX_MEMBER_BYTES
from data_pipelines.shards.writer import filled, write_shard
from data_pipelines.text import counted, cut, to_json
from data_pipelines.tools.pairs import Pairs, Row


@dataclass
class Packed:
    """What came of a source."""

    manifests: list[Manifest] = field(default_factory=list)  # of training, and of what is held out
    rejected: Counter[str] = field(default_factory=Counter)  # rows by kind of reason
    first: str = ""  # of these rows


def pack(
    pairs: Pairs,
    folder: Path,
    *,
    samples_per_shard: int,
    heldout: int = 0,
    label_column: str = "",
    on_row: Callable[[], None] = lambda: None,
) -> Packed:
    """Writes the shards of a source, their manifest with checksums, and `rejected.jsonl`.

    Image bytes go in as they are, once they have been decoded to see that they can be. The other columns go into
    each sample's json.

    Args:
        pairs: From `read_pairs`.
        folder: New or empty. With `heldout` it gets two folders, train and heldout.
        samples_per_shard: The last shard may have fewer.
        heldout: Samples to set apart, those whose images have the least hashes: no image is on both sides.
        label_column: Its values become the classes of heldout/prompts.json.
        on_row: Called as each row is done.

    Raises:
        DataError: The source cannot be read, the folder is not empty, or no row is good. A bad row is none: it is
            listed.
    """
    label = pairs.fields.get(label_column, "")
    if label_column and not label:
        names = cut(", ".join(map(repr, pairs.fields))) or "none"
        raise DataError(f"{pairs.source} has no label column {label_column!r}; its other columns are {names}.")
    packed, kept, labels = Packed(), list[Sample](), set[str]()
    with filled(folder) as place:
        samples = _good_samples(pairs, place / "rejected.jsonl", packed, on_row)
        if label:
            samples = _noting_labels(samples, label, labels)
        splits = {"": samples}
        if heldout:
            splits = {"train": _without_least(samples, heldout, kept), "heldout": kept}
        for name, split in splits.items():
            shards = _write_shards(place / name, iter(split), samples_per_shard)
            if not shards:
                raise _too_few(pairs.source, packed, len(kept))
            manifest, _ = build_manifest(shards, place / name / "manifest.json", checksums=True)
            manifest.save()
            packed.manifests.append(manifest)
        if label:
            classes = {name: [f"a photo of a {name}"] for name in sorted(labels)}
            prompts = to_json({"field": label, "classes": classes}, indent=2)
            (place / "heldout" / "prompts.json").write_text(prompts + "\n", encoding="utf-8")
    return packed


def _good_samples(pairs: Pairs, listing: Path, packed: Packed, on_row: Callable[[], None]) -> Iterator[Sample]:
    rows = pairs.rows()
    with listing.open("w", encoding="utf-8") as report, ThreadPoolExecutor() as pool:
        # Threads, since decoding releases the interpreter; in chunks, so that memory stays small.
        while chunk := list(islice(rows, 256)):
            for row, outcome in zip(chunk, pool.map(_sample, chunk), strict=True):
                on_row()
                if isinstance(outcome, Sample):
                    yield outcome
                    continue
                kind, reason = outcome
                packed.rejected[kind] += 1
                packed.first = packed.first or f"row {row.number}, {reason}"
                image = cut(str(row.image)) if isinstance(row.image, Path) else ""
                report.write(to_json({"row": row.number, "image": image, "reason": reason}) + "\n")


def _sample(row: Row) -> Sample | tuple[str, str]:
    """What goes into a shard, or why nothing does: (kind, reason)."""
    kind = "bad row"
    try:
        if row.fault:
            raise SampleError(row.fault)
        kind = "missing image"
        data = row.image if isinstance(row.image, bytes) else _read(row.image, "image")
        kind = "bad image"
        if (found := image_format(data)) and found not in FORMATS:
            kind = "format that is not supported"
        extension = read_header(data).extension
        kind = "bad caption"
        text, several = _caption(row.caption)
        kind = "bad metadata"
        members = {extension: data, "txt": text, "json": _json(row.metadata | several)}
        sample = Sample("", f"{row.number:09d}", members)
        sample.metadata()
        kind = "bad caption"
        sample.captions()
        kind = "bad image"
        check_image(data)
        return sample
    except SampleError as error:
        return kind, str(error)


def _caption(found: object) -> tuple[bytes, dict[str, object]]:
    """A sample's .txt, and what goes into its json."""
    if found is None:
        raise SampleError("caption is missing")
    if isinstance(found, Path):
        return _read(found, "caption"), {}
    if isinstance(found, bytes):
        return found, {}
    texts = found if isinstance(found, list) else [found]
    if strangers := sorted({type(text).__name__ for text in texts if not isinstance(text, str)}):
        raise SampleError(f"caption is not text but {'a list of ' * (texts is found)}{', '.join(strangers)}")
    try:
        encoded = [str(text).encode() for text in texts if str(text).strip()]
    except UnicodeEncodeError:
        raise SampleError("caption holds half a character, a lone surrogate") from None
    return encoded[0] if encoded else b"", {"captions": texts} if len(encoded) > 1 else {}


def _read(path: Path, what: str) -> bytes:
    try:
        told = path.stat()
        if not stat.S_ISREG(told.st_mode):  # reading a pipe would block
            raise SampleError(f"{what} cannot be read: it is no file")
        if told.st_size > MAX_MEMBER_BYTES:
            raise SampleError(f"{what} of {told.st_size:,} bytes is larger than {MAX_MEMBER_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{what} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SampleError(f"{what} cannot be read: its path holds a null byte or half a character") from None


def _json(metadata: dict[str, object]) -> bytes:
    try:
        return to_json(metadata).encode()
    except (RecursionError, TypeError) as error:
        raise SampleError(f"metadata cannot be written as JSON ({type(error).__name__})") from None


def _noting_labels(samples: Iterator[Sample], label: str, labels: set[str]) -> Iterator[Sample]:
    for sample in samples:
        value = sample.metadata().get(label)
        if value is not None and str(value).strip():  # an empty cell is no class
            labels.add(str(value))  # as evaluation compares them
        yield sample


def _without_least(samples: Iterator[Sample], count: int, kept: list[Sample]) -> Iterator[Sample]:
    """All but the `count` samples whose images have the least hashes, which end in `kept`.

    Equal images stay together: where their number would be passed, none of them is kept.
    """
    heap: list[tuple[int, str, Sample]] = []  # the greatest hash first
    bound = 1 << 64
    for sample in samples:
        hashed = int(hash64(sample.image))
        if hashed >= bound:
            yield sample
            continue
        heappush(heap, (-hashed, sample.key, sample))
        if len(heap) > count:
            bound = -heap[0][0]
            while heap and heap[0][0] == -bound:
                yield heappop(heap)[2]
    kept += sorted((sample for *_, sample in heap), key=lambda sample: sample.key)


def _write_shards(folder: Path, samples: Iterator[Sample], samples_per_shard: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    shards: list[Path] = []
    while batch := list(islice(samples, samples_per_shard)):
        shards.append(folder / f"{len(shards):05d}.tar")
        write_shard(shards[-1], map(_members, batch))
    return shards


def _members(sample: Sample) -> dict[str, bytes | str]:
    return {"__key__": sample.key, **sample.members, "txt": sample.captions()[0].encode()}


def _too_few(source: Path, packed: Packed, kept: int) -> DataError:
    if kept:
        return DataError(f"{source} has {counted(kept, 'good sample')}, too few to train on others: hold out fewer.")
    if packed.manifests:  # of training
        return DataError(f"{source} repeats one image more often than samples are held out: hold out more.")
    reasons = ", ".join(f"{count:,} x {kind}" for kind, count in packed.rejected.most_common())
    first = f"; the first is {packed.first}" if reasons else ""
    return DataError(f"Nothing in {source} could be packed ({reasons or 'it has no rows'}{first}): mend the rows.")
