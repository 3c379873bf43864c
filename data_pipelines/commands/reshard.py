"""Shuffles all samples that the sources keep. Members stay as they are, byte for byte; a key that comes twice in a new
shard gets the number of its source in front. An interrupted run goes on where it was. Without --shard the manifest is
written, too.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from data_pipelines.text import counted
from data_pipelines.tools.console import OUT, progress_bar
from data_pipelines.tools.options import add_part, add_processes, add_sources, at_least

HELP = "shuffle everything into new shards of one size"
EXAMPLES = ("data/web/manifest.json -o data/shuffled --samples-per-shard 10000",)


def add_arguments(parser: ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the new shards")
    parser.add_argument("--samples-per-shard", type=at_least(1), default=10_000, help="the last shard may have fewer")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another order")
    add_processes(parser)
    add_part(parser)


def run(options: Namespace) -> None:
    from data_pipelines.shards.index import build_manifest
    from data_pipelines.tools.reshard import Resharding
    from data_pipelines.tools.sources import WHOLE, Part, load_sources

    part, folder, manifest = Part.parse(options.shard), options.output, options.output / "manifest.json"
    with TemporaryDirectory() as scratch:
        sources = load_sources(options.sources, Path(scratch), processes=options.processes)
        job = Resharding(tuple(sources), folder, options.samples_per_shard, options.seed)
        job.start()
        ours = part.of(range(job.num_shards))
        with progress_bar("writing", len(ours), "shards") as advance:
            written = job.write(part=part, processes=options.processes, on_shard=advance)
    table = Table("", "samples", "shards")
    table.add_row("sources", f"{job.samples:,}", f"{len(sources):,}")
    table.add_row(str(folder), f"{job.samples:,}", f"{job.num_shards:,}")
    OUT.print(table)
    print(f"{written:,} of {len(ours):,} shards were written, the others were there")
    if part == WHOLE:
        shards = [job.path(shard) for shard in range(job.num_shards)]
        made, _ = build_manifest(shards, manifest, processes=options.processes)
        made.save()
        print(f"{manifest}: {counted(made.samples, 'sample')} in {counted(len(shards), 'shard')}")
    else:
        print(f"When all parts are done: python -m data_pipelines index {folder} -o {manifest}")
