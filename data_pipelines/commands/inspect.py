"""Writes FOLDER/report.html, which needs nothing else. The same call shows the same samples."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipelines.text import counted
from data_pipelines.tools.console import print_counts, progress_bar
from data_pipelines.tools.options import add_processes, add_sources, at_least

HELP = "show samples, histograms, duplicates and problems as a page to look at"
EXAMPLES = ("data/web/manifest.json -o report",)


def add_arguments(parser: ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--samples", type=at_least(1), default=64, help="to show, spread over all shards")
    parser.add_argument("--seed", type=int, default=0, help="another seed shows other samples")
    add_processes(parser)


def run(options: Namespace) -> None:
    from data_pipelines.shards.manifest import write_atomically
    from data_pipelines.tools.inspection import inspect
    from data_pipelines.tools.report import html_report
    from data_pipelines.tools.sources import load_sources

    with TemporaryDirectory() as scratch:
        sources = load_sources(options.sources, Path(scratch), processes=options.processes)
        with progress_bar("counting", len(sources), "shards") as advance:
            found = inspect(
                options.sources,
                sources,
                samples=options.samples,
                seed=options.seed,
                processes=options.processes,
                on_shard=advance,
            )
    page, html = options.output / "report.html", html_report(found)
    write_atomically(page, lambda tmp: tmp.write_text(html, encoding="utf-8", errors="backslashreplace"))
    print(f"{page}: {len(found.pictures):,} of {counted(found.total, 'sample')}")
    print(f"one core decodes {found.samples_per_s:,.0f} samples/s, {found.mb_per_s:,.1f} MB/s")
    print_counts(found.census.unusable, "unusable", "samples")
