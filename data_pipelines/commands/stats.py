"""Counts over all samples, or over some spread evenly. Images are not decoded; of several captions the first counts.
With --shard each part writes what it counted, and --merge adds the parts up exactly.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipelines.text import to_json
from data_pipelines.tools.console import print_census, progress_bar
from data_pipelines.tools.options import SOURCES, add_part, add_processes, at_least

HELP = "count sizes, lengths, formats, scripts and duplicates"
EXAMPLES = ("data/web/manifest.json --sample 10000", "--merge stats.0-of-2.npz stats.1-of-2.npz")


def add_arguments(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("sources", nargs="*", default=[], metavar="SOURCES", help=SOURCES)
    what.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="parts to add up, instead of sources")
    parser.add_argument("-o", "--output", type=Path, default=Path("stats.json"), help="file to write")
    parser.add_argument("--sample", type=at_least(1), metavar="NUMBER", help="read so many samples only")
    parser.add_argument("--language-field", default="", metavar="FIELD", help="of json; counted besides the scripts")
    add_processes(parser)
    add_part(parser)


def run(options: Namespace) -> None:
    from data_pipelines.shards.manifest import write_atomically
    from data_pipelines.tools.census import merge_parts, take_census
    from data_pipelines.tools.sources import WHOLE, Part, load_sources, name_sources

    part = Part.parse(options.shard)
    if options.merge:
        census = merge_parts(options.merge)
    else:
        with TemporaryDirectory() as scratch:
            if options.sample is None:
                sources = name_sources(options.sources)
            else:
                sources = load_sources(options.sources, Path(scratch), processes=options.processes)
            with progress_bar("counting", len(part.of(sources)), "shards") as advance:
                census = take_census(
                    sources,
                    limit=options.sample,
                    language_field=options.language_field,
                    part=part,
                    processes=options.processes,
                    on_shard=advance,
                )
    if part != WHOLE:
        path = part.file(options.output.with_suffix(".npz"))
        census.save_part(path, part)
        print(f"{path}: {census.samples:,} samples; add the parts up with `python -m data_pipelines stats --merge`")
        return
    content = census.to_dict()
    write_atomically(options.output, lambda tmp: tmp.write_text(to_json(content, indent=2) + "\n", encoding="utf-8"))
    print_census(content)
    print(f"{options.output}: the same as JSON")
