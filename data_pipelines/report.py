"""The report of an inspection: one HTML file that needs nothing else, and runs nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from data_pipelines.census import UNITS, Distribution
from data_pipelines.inspection import CENSUS_SAMPLES, Group, Inspection, Picture
from data_pipelines.storage import file_name, shown
from data_pipelines.verify import Problem

_BARS = 32
_TITLES = {
    "width": "Width in pixels",
    "height": "Height in pixels",
    "aspect": "Width over height",
    "image_bytes": "Bytes of an image",
    "caption_characters": "Characters of a caption",
    "caption_words": "Words of a caption",
    "shard_bytes": "Bytes of a shard",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b73; --paper: #fff; --shade: #f3f3f6; --line: #dcdce2;
  --bar: #3b6fd4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #9d9da8; --paper: #17171a; --shade: #222227;
  --line: #36363d; --bar: #7aa2f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1rem 0 .5rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--shade); border-radius: 8px; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, .left td, .left th { text-align: left; } th { color: var(--soft); font-weight: 500; }
.scroll { overflow-x: auto; } td { overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.25rem; }
.columns { display: flex; flex-wrap: wrap; gap: 3rem; } svg { width: 100%; height: auto; display: block; }
svg rect { fill: var(--bar); } svg text { fill: var(--soft); font-size: 11px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--shade); border-radius: 8px; overflow: hidden; }
figure div { height: 192px; display: grid; place-items: center; } figure img { max-width: 100%; display: block; }
figcaption { padding: .5rem .7rem .7rem; font-size: .85rem; overflow-wrap: anywhere; }
figcaption span { display: -webkit-box; -webkit-line-clamp: 5; -webkit-box-orient: vertical; overflow: hidden; }
figcaption small { color: var(--soft); display: block; margin-top: .3rem; }
"""


def html_report(inspection: Inspection) -> str:
    """A whole page. Captions, keys and names are escaped: what looks like a tag in them stays text."""
    census = inspection.census
    read = census.samples + census.unusable.total()
    figures = {
        "samples": f"{inspection.total:,}",
        "shards read": f"{census.measured['shard_bytes'].counts.total():,}",
        "unusable": f"{census.unusable.total():,}",
        "decoded a second on one core": f"{inspection.samples_per_s:,.0f}",
        "MB of images a second": f"{inspection.mb_per_s:,.1f}",
    }
    sections = [
        f"<h1>Inspection</h1><p class='soft'>{escape(' '.join(map(shown, inspection.sources)))}</p>",
        "<div class='figures'>" + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in figures.items()) + "</div>",
        f"<p class='soft'>Counted over {read:,} samples spread evenly (at most {CENSUS_SAMPLES:,}). "
        f"Decoding is of the samples shown, whole, to 224 x 224 pixels.</p>",
        "<h2>Samples</h2>" + _pictures(inspection.pictures),
        "<h2>Sizes and lengths</h2>" + _sizes(census.measured),
        "<h2>Distributions</h2><div class='charts'>"
        + "".join(_histogram(_TITLES[name], found, UNITS[name]) for name, found in census.measured.items())
        + "</div>",
        "<h2>Kinds</h2><div class='columns'>"
        + _shares("Format", census.formats.most_common(), census.samples)
        + _shares("Script or language", census.languages.most_common(12), census.samples)
        + _shares("Field of json", census.fields.most_common(20), census.samples)
        + "</div>",
        "<h2>Duplicates</h2>" + _duplicates(census.duplicates(), inspection.groups),
        "<h2>Problems</h2>" + _problems(census.unusable.most_common(), inspection.problems),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width'><title>Inspection</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    return f"<div class='pictures'>{''.join(map(_figure, pictures))}</div>"


def _figure(picture: Picture) -> str:
    jpeg = io.BytesIO()
    picture.thumbnail.save(jpeg, "JPEG", quality=85)
    source = base64.b64encode(jpeg.getvalue()).decode()
    caption, place = escape(picture.caption), f"{file_name(picture.shard)} {picture.key}"
    return (
        f"<figure><div><img alt='' src='data:image/jpeg;base64,{source}'></div><figcaption>"
        f'<span title="{caption}">{caption}</span>'
        f"<small>{escape(place)} · {picture.width} x {picture.height}</small></figcaption></figure>"
    )


def _sizes(measured: dict[str, Distribution]) -> str:
    summaries = {_TITLES[name]: found.summary(UNITS[name]) for name, found in measured.items()}
    head = ("", *next(iter(summaries.values())))
    rows = ((title, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in summary.values()))
            for title, summary in summaries.items())  # fmt: skip
    return _table(head, rows)


def _histogram(title: str, found: Distribution, unit: int) -> str:
    numbers = sorted(found.counts)
    if not numbers:
        return ""
    # Up to the 99th percentile: a single giant would leave nothing to see of the others.
    least, most = numbers[0], found.percentile(99)
    step = max(1, math.ceil((most + 1 - least) / _BARS))
    bars = [0] * math.ceil((most + 1 - least) / step)
    for number in numbers:
        bars[min((number - least) // step, len(bars) - 1)] += found.counts[number]
    width = min(280 / len(bars), 40)
    drawn = "".join(
        f"<rect x='{place * width:.1f}' y='{90 - 80 * count / max(bars):.1f}' width='{max(width - 1, 1):.1f}' "
        f"height='{80 * count / max(bars):.1f}'/>"
        for place, count in enumerate(bars)
        if count
    )
    return (
        f"<div><h3>{title}</h3><svg viewBox='0 0 280 106' role='img'>{drawn}"
        f"<text x='0' y='103'>{least / unit:,g}</text>"
        f"<text x='280' y='103' text-anchor='end'>{most / unit:,g}{' and above' if numbers[-1] > most else ''}</text>"
        f"</svg></div>"
    )


def _shares(title: str, counts: Iterable[tuple[str, int]], total: int) -> str:
    rows = [(name, f"{count:,}", f"{count / max(1, total):.1%}") for name, count in counts]
    return f"<div>{_table((title, 'samples', 'share'), rows)}</div>" if rows else ""


def _duplicates(found: dict[str, dict[str, int]], groups: Sequence[Group]) -> str:
    rows = [(kind, *(f"{count:,}" for count in numbers.values())) for kind, numbers in found.items()]
    text = _table(("equal", "samples like an earlier one", "groups", "largest group"), rows)
    for group in groups:
        text += f"<h3>{group.samples:,} samples with one {group.kind}</h3>{_pictures(group.pictures)}"
    return text


def _problems(reasons: Sequence[tuple[str, int]], examples: Sequence[Problem]) -> str:
    if not reasons and not examples:
        return "<p>None was found.</p>"
    text = _shares("reason", reasons, sum(count for _, count in reasons))
    rows = ((file_name(found.shard), found.key, found.reason) for found in examples)
    return f"{text}<h3>Examples</h3><div class='left'>{_table(('shard', 'key', 'reason'), rows)}</div>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{titles}</tr>{lines}</table></div>"
