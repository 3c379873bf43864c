"""What the pipelines make of a mutant, compared with what the oracle says of its bytes."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipelines.batch import known_tensors
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError, SampleError
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.decode import check_image
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.shards.index import Report, build_manifest
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.sample import Sample, hash64, normalised_caption
from data_pipelines.shards.scan import FeatureFields, features, scan
from data_pipelines.storage.files import open_bytes
from data_pipelines.stream.loader import TrainingData
from data_pipelines.stream.reader import ShardReader
from fuzz.mutants import FIRED, TAGS, Mutant, shards
from fuzz.oracle import IMAGES, Found, UnusableError, captions, read_range, read_shard

CPU_LIMIT_S = 10.0  # of one mutant, read twice over in two ways; 12 ms are usual
MEMORY_LIMIT_BYTES = 1 << 30  # of address space, beyond what the process has before
ENDS = {  # of a shard that is not whole
    "damaged": "the shard is damaged or cut short here",
    "no tar": "the file is no tar",
    "trailing": "bytes that are no tar follow the end of the archive",
}

Outcome = Sample | str  # what `ShardReader.read` gives, or the kind of its error


@dataclass(frozen=True)
class Bench:
    """A folder to spoil shards in, with the good ones already indexed."""

    folder: Path
    tokenizer: Path

    @classmethod
    def made(cls, folder: Path, tokenizer: Path) -> Bench:
        for number, shard in enumerate(shards()):
            place = folder / f"good{number}"
            place.mkdir(parents=True)
            (place / "a.tar").write_bytes(shard.data)
            build_manifest([place / "a.tar"], place / "manifest.json", processes=1)[0].save()
        return cls(folder, tokenizer)

    def training(self, manifest: Path, samples: int) -> TrainingData:
        """An epoch of it is one batch, in which each sample has its turn."""
        settings = {"train": manifest, "tokenizer": self.tokenizer, "workers": 0, "grain": 1, "lanes": 1}
        config = DataConfig.model_validate(settings | {"window": samples})
        spec = BatchSpec(config, Tokenizer.load(self.tokenizer), known_tensors(), 8, 12, 0.15, seed=7)
        return TrainingData(spec, global_batch=samples)


def try_mutant(bench: Bench, mutant: Mutant, outcomes: Counter[str]) -> None:
    """Indexes and reads a mutant, and reads it in the place of the shard that was indexed.

    Raises:
        AssertionError: A claim does not hold.
    """
    start = time.process_time()
    _index_and_read(bench, mutant, outcomes)
    if len(mutant.data) == len(shards()[mutant.shard].data):
        _read_in_place(bench, mutant, outcomes)
    assert time.process_time() - start < CPU_LIMIT_S
    assert not (bench.folder / FIRED).exists()


def _index_and_read(bench: Bench, mutant: Mutant, outcomes: Counter[str]) -> None:
    found, end = read_shard(mutant.data)
    good = [sample for sample in found if not sample.fault]
    if mutant.kind == "damage a payload" and not mutant.twice:
        assert len(found) == len(TAGS[:-1])
        assert not end
    folder = bench.folder / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shard = folder / "a.tar"
    shard.write_bytes(mutant.data)
    try:
        manifest, report = build_manifest([shard], folder / "manifest.json", processes=1)
    except DataError as error:
        check_sentence(error, shard)
        manifest, report = None, Report()
    assert (manifest is None) == (not good)
    if manifest is None:
        outcomes["nothing usable, refused"] += 1
        return
    manifest.save()
    _check_report(report, found, end)
    outcomes["samples left out by the index"] += len(report.faults)
    _check_features(shard, found)
    _check_reading(bench, manifest, good, mutant, outcomes)


def _read_in_place(bench: Bench, mutant: Mutant, outcomes: Counter[str]) -> None:
    """The bytes change under a run: the manifest and the index are those of the good shard."""
    folder = bench.folder / f"good{mutant.shard}"
    (folder / "a.tar").write_bytes(mutant.data)
    manifest = Manifest.load(folder / "manifest.json")
    found = [read_range(mutant.data[start:stop]) for start, stop, _ in np.load(manifest.index_path(0))]
    told = ["changed" if sample is None or sample.fault else sample for sample in found]
    _check_reading(bench, manifest, told, mutant, outcomes)


def _check_report(report: Report, found: list[Found], end: str) -> None:
    faults = [(sample.key, sample.fault) for sample in found if sample.fault] + ([("", ENDS[end])] if end else [])
    assert [(fault.key, fault.reason) for fault in report.faults] == faults


def _check_features(shard: Path, found: list[Found]) -> None:
    source = open_bytes(str(shard), patience_s=1)
    rows = scan(source)
    table = features(source, rows, FeatureFields("score", "language"))
    source.close()
    for sample, described in zip(found, table, strict=False):
        if not sample.fault:
            said = _captions(sample)
            assert int(described["caption_characters"]) == (len(said[0]) if said else 0), sample.key


def _check_reading(
    bench: Bench, manifest: Manifest, told: Sequence[Found | str], mutant: Mutant, outcomes: Counter[str]
) -> None:
    shard = Path(manifest.shards[0].location)
    first, second = (_read(manifest, shard) for _ in range(2))
    assert first == second
    for sample, wanted in zip(first, told, strict=True):
        if isinstance(wanted, str) or isinstance(sample, str):
            assert sample == wanted
            outcomes[f"read: {wanted}"] += 1
        else:
            assert (sample.key, sample.image) == (wanted.key, wanted.first(*IMAGES))
            assert (sample.text, sample.json) == (wanted.first("txt"), wanted.first("json"))
            assert [*_said(sample)] == _captions(wanted)
            _check_pair(sample, mutant, outcomes)
    _check_training(bench, manifest, told, outcomes)


def _check_pair(sample: Sample, mutant: Mutant, outcomes: Counter[str]) -> None:
    image = _first_tag(sample.image.decode("latin-1"))
    tags = {tag for text in (sample.key, *_said(sample)) if (tag := _first_tag(text))}
    if image is None or not tags:
        outcomes["read: without its tags"] += 1
    elif tags == {image}:
        outcomes["read: a pair"] += 1
    else:
        assert mutant.may_mix, (sample.key, image, tags)
        outcomes["read: a wrong pair, as the tar has it"] += 1


def _check_training(bench: Bench, manifest: Manifest, told: Sequence[Found | str], outcomes: Counter[str]) -> None:
    shard = Path(manifest.shards[0].location)
    data = bench.training(manifest.path, manifest.samples)
    usable = [_usable(sample, data) for sample in told]
    try:
        batch, again = (next(data.batches(data.initial_state())) for _ in range(2))
    except DataError as error:
        check_sentence(error, shard)
        batch = again = None
    assert (batch is None) == ("changed" in told or not any(usable))
    if batch is None or again is None:
        outcomes["training stopped"] += 1
        return
    assert all(map(torch.equal, batch.tensors.values(), again.tensors.values()))
    assert batch.bad == again.bad
    assert len(batch) == manifest.samples
    found = [sample for sample in told if isinstance(sample, Found)]  # all of them
    unusable = [sample.key for sample, fine in zip(found, usable, strict=True) if not fine]
    assert sorted(sample.key for sample in batch.bad) == sorted(unusable)
    ids = (batch.tensors[name].tolist() for name in ("image_ids", "caption_ids"))
    pairs = {
        (int(hash64(sample.first(*IMAGES) or b"", "<i8")), int(hash64(normalised_caption(caption), "<i8")))
        for sample in found
        for caption in _captions(sample)
    }
    assert pairs.issuperset(zip(*ids, strict=True))
    outcomes["trained on"] += manifest.samples - len(batch.bad)
    outcomes["replaced in training"] += len(batch.bad)


def _usable(sample: Found | str, data: TrainingData) -> bool:
    if isinstance(sample, str):
        return False
    said = _captions(sample)
    if not said or not data.tokenizer.encode(said[0], 12)[1].any():
        return False
    try:
        check_image(sample.first(*IMAGES) or b"")
    except SampleError:
        return False
    return True


def _read(manifest: Manifest, shard: Path) -> list[Outcome]:
    reader = ShardReader(manifest)
    read: list[Outcome] = []
    for index in range(manifest.samples):
        try:
            read.append(reader.read(0, index))
        except SampleError as error:
            read.append(str(error))
        except DataError as error:
            check_sentence(error, shard)
            read.append("changed")
    reader.close()
    return read


def check_sentence(error: DataError, source: Path) -> None:
    """One line of bounded length that names the source."""
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 1000 + 2 * len(str(source)), message
    assert str(source) in message, message


def _said(sample: Sample) -> tuple[str, ...]:
    try:
        return sample.captions()
    except SampleError:
        return ()


def _captions(sample: Found) -> list[str]:
    try:
        return captions(sample)
    except UnusableError:
        return []


def _first_tag(text: str) -> str | None:
    places = [(at, tag) for tag in TAGS if (at := text.find(tag)) >= 0]
    return min(places)[1] if places else None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Allocations fail beyond the bound, and a MemoryError is none of the errors that a mutant may raise."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
