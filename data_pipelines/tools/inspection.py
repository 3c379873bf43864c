"""What a corpus looks like: samples chosen to be shown, its census, its duplicates, and how fast it decodes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines.errors import SampleError
from data_pipelines.randomness import Purpose, uniform
from data_pipelines.samples.augment import Box
from data_pipelines.samples.decode import decode_crop
from data_pipelines.shards.problems import Problem
from data_pipelines.shards.sample import Sample, parse_sample
from data_pipelines.shards.tar import TarError
from data_pipelines.tools.census import Census, take_census
from data_pipelines.tools.sources import Source, by_source

THUMBNAIL = 192  # pixels of the longer side
CENSUS_SAMPLES = 20_000  # more hardly change what a histogram looks like
_DECODED_SIZE = 224  # pixels: what the throughput is measured for
_MEASURE_S = 0.5
_GROUPS, _GROUP_SAMPLES = 8, 6  # of duplicates that are shown


@dataclass(frozen=True)
class Picture:
    """A sample as it is shown."""

    shard: str
    key: str
    caption: str
    thumbnail: Image.Image
    width: int  # pixels of the image itself
    height: int


@dataclass(frozen=True)
class Group:
    """Samples with equal images or equal captions."""

    kind: str
    samples: int
    pictures: list[Picture]  # the first few


@dataclass(frozen=True)
class Inspection:
    """What a report tells."""

    sources: list[str]  # as the user named them
    total: int  # samples in all sources
    census: Census
    pictures: list[Picture]
    problems: list[Problem]
    groups: list[Group]
    samples_per_s: float  # one core decodes, whole images to 224 x 224
    mb_per_s: float  # of compressed images


def inspect(
    names: Sequence[str],
    sources: Sequence[Source],
    *,
    samples: int,
    seed: int,
    processes: int | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Inspection:
    """Looks at a corpus. The same call chooses the same samples.

    Args:
        names: How the user named the sources.
        sources: From `load_sources`.
        samples: To show.
        seed: Another one shows others.
        processes: Counting at the same time, by default one per core.
        on_shard: Called as each shard is counted.

    Raises:
        DataError: A shard cannot be read.
    """
    census = take_census(sources, limit=CENSUS_SAMPLES, processes=processes, on_shard=on_shard)
    total = sum(source.entry.samples for source in sources if source.entry)
    problems = list(census.examples)
    chosen = [
        sample
        for source, numbers in by_source(sources, choose(total, samples, seed))
        for sample in _read(source, source.kept(source.entry.indexed if source.entry else 0)[numbers], problems)
    ]
    pictures: list[Picture] = []
    for sample in chosen:
        try:
            pictures.append(_picture(sample))
        except SampleError as error:
            problems.append(Problem(sample.shard, sample.key, str(error)))
    shown = {(picture.shard, picture.key) for picture in pictures}
    speed = _decoding_speed([sample.image for sample in chosen if (sample.shard, sample.key) in shown])
    groups = [group for row, kind in enumerate(("image", "caption")) for group in _groups(sources, census, row, kind)]
    return Inspection(list(names), total, census, pictures, list(dict.fromkeys(problems)), groups, *speed)


def choose(total: int, count: int, seed: int) -> np.ndarray:
    """Positions of `count` samples, one drawn from each of as many equal stretches of `total`: ascending (n,) int64."""
    count = min(count, total)
    edges = np.arange(count + 1) * total // max(1, count)
    return edges[:-1] + (uniform(seed, Purpose.INSPECT, size=count) * np.diff(edges)).astype(np.int64)


def _read(source: Source, numbers: np.ndarray, problems: list[Problem]) -> list[Sample]:
    """The samples in some rows; those that cannot be read become problems."""
    samples: list[Sample] = []
    data = source.open(ahead=False)
    try:
        rows = source.rows(data)
        for start, stop, _ in rows[numbers].tolist():
            try:
                samples.append(parse_sample(source.location, data.read(start, stop - start)))
            except (SampleError, TarError) as error:
                problems.append(Problem(source.location, getattr(error, "key", "") or f"byte {start:,}", str(error)))
    finally:
        data.close()
    return samples


def _picture(sample: Sample) -> Picture:
    sides: list[int] = []

    def whole(height: int, width: int) -> Box:
        sides[:] = height, width
        return Box(0, 0, height, width)

    square = Image.fromarray(decode_crop(sample.image, whole, THUMBNAIL))  # as training decodes it
    height, width = sides
    longer = max(height, width)
    size = max(1, round(THUMBNAIL * width / longer)), max(1, round(THUMBNAIL * height / longer))
    thumbnail = square.resize(size, Image.Resampling.LANCZOS)
    return Picture(sample.shard, sample.key, sample.caption(), thumbnail, width, height)


def _groups(sources: Sequence[Source], census: Census, row: int, kind: str) -> list[Group]:
    by_number = {source.number: source for source in sources}
    groups: list[Group] = []
    for places in census.groups(row, _GROUPS):
        by_shard: dict[int, list[int]] = defaultdict(list)
        for number, place in places[:_GROUP_SAMPLES].tolist():
            by_shard[number].append(place)
        pictures: list[Picture] = []
        for number, rows in by_shard.items():
            for sample in _read(by_number[number], np.array(rows), []):
                with suppress(SampleError):
                    pictures.append(_picture(sample))
        groups.append(Group(kind, len(places), pictures))
    return groups


def _decoding_speed(images: Sequence[bytes]) -> tuple[float, float]:
    """(samples/s, MB/s of compressed bytes) on one core; zeros where there is nothing to decode."""
    num_images = num_bytes = 0
    start = time.perf_counter()
    while (passed_s := time.perf_counter() - start) < _MEASURE_S:
        for image in images:
            decode_crop(image, lambda height, width: Box(0, 0, height, width), _DECODED_SIZE)
            num_images, num_bytes = num_images + 1, num_bytes + len(image)
    return num_images / passed_s, num_bytes / passed_s / 1e6
