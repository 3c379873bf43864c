"""The report of an inspection: one HTML file that needs nothing else, and runs nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader

from data_pipelines.storage.addresses import file_name, shown
from data_pipelines.tools.census import UNITS
from data_pipelines.tools.distribution import Distribution
from data_pipelines.tools.inspection import CENSUS_SAMPLES, Inspection, Picture

_BARS = 32
_WIDTH, _HEIGHT, _TOP = 280, 80, 16  # of a chart's bars
_TITLES = {
    "width": "Width in pixels",
    "height": "Height in pixels",
    "aspect": "Width over height",
    "image_bytes": "kB of an image",
    "caption_characters": "Characters of a caption",
    "caption_words": "Words of a caption",
    "shard_bytes": "MB of a shard",
}
_UNITS = UNITS | {"image_bytes": 1000, "shard_bytes": 10**6}


@dataclass(frozen=True)
class _Bar:
    x: str
    y: str
    width: str
    height: str


@dataclass(frozen=True)
class _Chart:
    title: str
    bars: list[_Bar]
    most_counted: str  # what the highest bar stands for
    least: str
    middle: str
    most: str


def html_report(inspection: Inspection) -> str:
    """A whole page. Captions, keys and names are escaped: what looks like a tag in them stays text."""
    environment = Environment(loader=PackageLoader("data_pipelines.tools", ""), autoescape=True, trim_blocks=True)
    environment.filters |= {"file_name": file_name, "data_url": _data_url, "shares": _shares}
    census, measured = inspection.census, inspection.census.measured
    read = census.samples + census.unusable.total()
    summaries = {_TITLES[name]: found.summary(_UNITS[name]) for name, found in measured.items()}
    return environment.get_template("report.html").render(
        names=list(map(shown, inspection.sources)),
        figures={
            "samples": f"{inspection.total:,}",
            "shards": f"{measured['shard_bytes'].counts.total():,}",
            "unusable": f"{census.unusable.total():,}",
            "decoded per second on one core": f"{inspection.samples_per_s:,.0f}",
            "MB of images per second": f"{inspection.mb_per_s:,.1f}",
        },
        notes=f"Counted over {read:,} samples spread evenly (at most {CENSUS_SAMPLES:,}). Decoding is of the samples "
        f"shown, whole, to 224 x 224 pixels.",
        sizes=(
            ("", *next(iter(summaries.values()))),
            [(title, *map(_number, summary.values())) for title, summary in summaries.items()],
        ),
        charts=[_chart(_TITLES[name], found, _UNITS[name]) for name, found in measured.items() if found.counts],
        census=census,
        fields=[
            (name, f"{found.samples:,}", f"{found.samples / max(1, census.samples):.1%}", found.range)
            for name, found in census.fields_by_count()
        ],
        problems=[(file_name(found.shard), found.key, found.reason, found.detail) for found in inspection.problems],
        duplicates=[
            (kind, *(f"{count:,}" for count in numbers.values())) for kind, numbers in census.duplicates().items()
        ],
        groups=inspection.groups,
        samples=inspection.pictures,
    )


def _data_url(picture: Picture) -> str:
    jpeg = io.BytesIO()
    picture.thumbnail.save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def _shares(counts: Iterable[tuple[str, int]], total: int) -> list[tuple[str, str, str]]:
    return [(name, f"{count:,}", f"{count / max(1, total):.1%}") for name, count in counts]


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _chart(title: str, found: Distribution, unit: int) -> _Chart:
    numbers = sorted(found.counts)
    # Up to the 99th percentile: one very large value would squeeze all others into one bar.
    least, most = numbers[0], found.percentile(99)
    step = max(1, math.ceil((most + 1 - least) / _BARS))
    bars = [0] * math.ceil((most + 1 - least) / step)
    for number in numbers:
        bars[min((number - least) // step, len(bars) - 1)] += found.counts[number]
    width = min(_WIDTH / len(bars), 40)
    drawn = [
        _Bar(f"{place * width:.1f}", f"{_TOP + _HEIGHT - height:.1f}", f"{max(width - 1, 1):.1f}", f"{height:.1f}")
        for place, count in enumerate(bars)
        if (height := _HEIGHT * count / max(bars))
    ]
    end = _number(most / unit) + (" and above" if numbers[-1] > most else "")
    return _Chart(title, drawn, f"{max(bars):,}", _number(least / unit), _number((least + most) / 2 / unit), end)
