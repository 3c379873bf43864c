"""What a corpus is like: sizes, lengths, formats, scripts and duplicates, counted so that parts add up exactly."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError, SampleError, cannot_open
from data_pipelines.parallel import each_done
from data_pipelines.shards.header import read_header
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.shards.problems import Problem
from data_pipelines.shards.sample import Fault, Sample, hash64, normalised_caption, parse_sample
from data_pipelines.shards.scan import label_at
from data_pipelines.shards.tar import TarError
from data_pipelines.text import to_json
from data_pipelines.tools.distribution import Distribution, JsonField
from data_pipelines.tools.scripts import script_of
from data_pipelines.tools.sources import WHOLE, Part, Source, by_source, spread

FORMAT = 2  # of the file of a part
_MAX_EXAMPLES = 50  # problems that are shown

UNITS = {  # of what is measured: numbers stand for hundredths where that says 100
    "width": 1,
    "height": 1,
    "aspect": 100,
    "image_bytes": 1,
    "caption_characters": 1,
    "caption_words": 1,
    "shard_bytes": 1,
}


_COUNTERS = ("unusable", "formats", "scripts", "languages")


@dataclass
class Census:
    """What was counted. Censuses of different samples can be merged in any order."""

    samples: int = 0  # that can be used
    left_out: int = 0  # by a manifest that read them
    unusable: Counter[str] = field(default_factory=Counter)  # samples by reason
    measured: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution() for name in UNITS})
    formats: Counter[str] = field(default_factory=Counter)  # of images
    scripts: Counter[str] = field(default_factory=Counter)  # of captions
    languages: Counter[str] = field(default_factory=Counter)  # by the field of json that names them
    fields: dict[str, JsonField] = field(default_factory=lambda: defaultdict(JsonField))  # of json
    prints: list[np.ndarray] = field(default_factory=list)  # (3, n) uint64: image, caption, place; 24 bytes per sample
    examples: list[Problem] = field(default_factory=list)

    def merge(self, other: Census) -> None:
        """Adds another up."""
        self.samples += other.samples
        self.left_out += other.left_out
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for name, values in other.fields.items():
            self.fields[name].merge(values)
        for name, distribution in other.measured.items():
            self.measured[name].merge(distribution)
        self.prints += other.prints
        self.examples = (self.examples + other.examples)[:_MAX_EXAMPLES]

    def duplicates(self) -> dict[str, dict[str, int]]:
        """Of images and of captions: how many samples equal an earlier one, in how many groups of which size."""
        found: dict[str, dict[str, int]] = {}
        for row, name in enumerate(("images", "captions")):
            _, sizes = np.unique(self._prints()[row], return_counts=True)
            groups = sizes[sizes > 1]
            found[name] = {
                "repeated": int((groups - 1).sum()),
                "groups": len(groups),
                "largest_group": int(groups.max(initial=0)),
            }
        return found

    def groups(self, row: int, most: int) -> list[np.ndarray]:
        """Where equal images (row 0) or captions (row 1) are: (n, 2) sources and rows, the largest groups first."""
        prints = self._prints()
        if not prints.size:
            return []
        order = np.lexsort((prints[2], prints[row]))
        starts = np.flatnonzero(np.diff(prints[row][order], prepend=~prints[row][order[:1]]))
        groups = [group for group in np.split(prints[2][order], starts[1:]) if len(group) > 1]
        groups.sort(key=lambda group: (-len(group), int(group[0])))
        return [np.stack((group >> np.uint64(32), group & np.uint64(0xFFFFFFFF)), 1) for group in groups[:most]]

    def to_dict(self) -> dict[str, object]:
        """What stats.json holds."""
        return {
            "samples": self.samples,
            "left_out_by_filters": self.left_out,
            "unusable": _by_count(self.unusable),
            "shards": self.measured["shard_bytes"].counts.total(),
            "bytes": self.measured["shard_bytes"].sum,
            **{name: distribution.summary(UNITS[name]) for name, distribution in self.measured.items()},
            "formats": _by_count(self.formats),
            "scripts": _by_count(self.scripts),
            "languages": _by_count(self.languages),
            "json_fields": {
                name: {"share": found.samples / self.samples, "numbers": found.numbers, "texts": found.texts}
                for name, found in self.fields_by_count()
            },
            "duplicates": self.duplicates(),
        }

    def fields_by_count(self) -> list[tuple[str, JsonField]]:
        """The fields of json, the most frequent first."""
        return sorted(self.fields.items(), key=lambda item: (-item[1].samples, item[0]))

    def save_part(self, path: Path, part: Part) -> None:
        """Writes all that `merge_parts` needs as .npz."""
        content = {
            "format": FORMAT,
            "part": [part.number, part.count],
            "samples": self.samples,
            "left_out": self.left_out,
            **{name: getattr(self, name) for name in _COUNTERS},
            "fields": {name: [values.samples, values.numbers, values.texts] for name, values in self.fields.items()},
            "measured": {n: [list(d.counts.items()), d.sum, d.least, d.most] for n, d in self.measured.items()},
        }

        def write(tmp: Path) -> None:
            with tmp.open("wb") as file:  # numpy adds .npz to a bare name
                np.savez(file, content=np.frombuffer(to_json(content).encode(), np.uint8), prints=self._prints())

        write_atomically(path, write)

    def _prints(self) -> np.ndarray:
        return np.concatenate([np.zeros((3, 0), np.uint64), *self.prints], axis=1)


@dataclass(frozen=True)
class _Task:
    source: Source
    chosen: np.ndarray | None  # (n,) positions among its kept samples; None for all


@dataclass(frozen=True)
class _Count:
    """What one process does to a shard."""

    language_field: str

    def __call__(self, task: _Task) -> Census:
        source, census = task.source, Census()
        data = source.open(ahead=task.chosen is None)
        try:
            census.measured["shard_bytes"].add(data.size)
            rows = source.rows(data)
            kept = source.kept(len(rows))
            faulty = rows[:, 2] != Fault.NONE
            lost = np.ones(len(rows), dtype=bool)
            lost[kept] = False
            census.left_out = int(np.count_nonzero(lost & ~faulty))
            for row in rows[faulty].tolist():
                census.unusable[Fault(row[2]).reason] += 1
                if len(census.examples) < _MAX_EXAMPLES:
                    census.examples.append(Problem.of_row(source.location, data, row))
            chosen = kept if task.chosen is None else kept[task.chosen]
            places: list[tuple[np.ndarray, np.ndarray, int]] = []
            for number in chosen[~faulty[chosen]].tolist():
                start, stop, _ = rows[number].tolist()
                try:
                    sample = parse_sample(source.location, data.read(start, stop - start))
                    hashes = self._count(census, sample)
                except (SampleError, TarError) as error:
                    _reject(census, source, label_at(data, start), str(error))
                    continue
                places.append((*hashes, source.number << 32 | number))
        finally:
            data.close()
        if places:
            census.prints = [np.array(places, dtype=np.uint64).T]
        return census

    def _count(self, census: Census, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        caption = sample.caption()
        header = read_header(sample.image)
        height, width = header.upright_size
        try:
            metadata = sample.metadata()
        except SampleError:
            metadata = {}
        numbers = {
            "width": width,
            "height": height,
            "aspect": round(100 * width / height),
            "image_bytes": len(sample.image),
            "caption_characters": len(caption),
            "caption_words": len(caption.split()),
        }
        for name, number in numbers.items():
            census.measured[name].add(number)
        census.samples += 1
        census.formats[header.format] += 1
        census.scripts[script_of(caption)] += 1
        if self.language_field:
            census.languages[str(metadata.get(self.language_field, "")) or "none"] += 1
        for name, value in metadata.items():
            census.fields[name].add(value)
        return hash64(sample.image), hash64(normalised_caption(caption))


def merge_parts(paths: Sequence[Path]) -> Census:
    """Adds up what `Census.save_part` wrote of all parts.

    Raises:
        DataError: A file is no such part, or the parts are not each part of one whole once.
    """
    total, parts = Census(), []
    for path in paths:
        part, census = _load_part(path)
        parts.append(part)
        total.merge(census)
    count = parts[0].count
    if sorted(parts) != [Part(number, count) for number in range(count)]:
        given = ", ".join(f"{part.number}/{part.count}" for part in parts)
        raise DataError(f"The parts {given} are not all parts of one whole, each once: give those of one `stats`.")
    return total


def take_census(
    sources: Sequence[Source],
    *,
    limit: int | None = None,
    language_field: str = "",
    part: Part = WHOLE,
    processes: int | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Census:
    """Counts all samples, or `limit` of them spread evenly. Images are not decoded.

    Args:
        sources: From `load_sources`, or without a limit from `name_sources`.
        limit: Samples to read; by default all.
        language_field: Of the json; counted besides the scripts of the captions.
        part: Which share of the shards to read.
        processes: By default one per core.
        on_shard: Called as each shard is done.

    Raises:
        DataError: A shard cannot be read.
    """
    if limit is None:
        tasks = [_Task(source, None) for source in sources]
    else:
        total = sum(source.entry.samples for source in sources if source.entry)
        chosen = {source.number: places for source, places in by_source(sources, spread(total, limit))}
        none = np.zeros(0, dtype=np.int64)  # faults of a shard count even if none of its samples is read
        tasks = [_Task(source, chosen.get(source.number, none)) for source in sources]
    counted: dict[int, Census] = {}
    for number, census in each_done(_Count(language_field), part.of(tasks), processes):
        counted[number] = census
        on_shard()
    total_census = Census()
    for _, census in sorted(counted.items()):
        total_census.merge(census)
    return total_census


def _load_part(path: Path) -> tuple[Part, Census]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content: dict[str, Any] = json.loads(arrays["content"].tobytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            census = Census(content["samples"], content["left_out"], prints=[arrays["prints"]])
        for name in _COUNTERS:
            getattr(census, name).update(content[name])
        census.fields.update((name, JsonField(*values)) for name, values in content["fields"].items())
        for name, (counts, *rest) in content["measured"].items():
            census.measured[name] = Distribution(Counter(dict(map(tuple, counts))), *rest)
        return Part(*content["part"]), census
    except FileNotFoundError as error:
        raise cannot_open(str(path), error) from None
    except Exception as error:  # whatever numpy and zip say of bytes that are no such file
        raise DataError(
            f"{path} is no part of a census ({type(error).__name__}): give the .npz files of `stats --shard`."
        ) from None


def _reject(census: Census, source: Source, key: str, reason: str) -> None:
    census.unusable[reason] += 1
    if len(census.examples) < _MAX_EXAMPLES:
        census.examples.append(Problem(source.location, key, reason))


def _by_count(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
