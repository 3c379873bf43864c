"""Checks sizes and, where the manifest has them, checksums; compares the index with the shards; decodes every image and
reads every caption. What is wrong is listed one line a problem; `index --exclude` reads the list. Exit code 4 where
there is any.
"""

import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

from data_pipelines.text import counted
from data_pipelines.tools.console import OUT, print_advice, print_counts, progress_bar
from data_pipelines.tools.options import add_part, add_processes, add_sources

HELP = "read every byte as training would, and list what is wrong"
EXAMPLES = ("data/web/manifest.json",)


def add_arguments(parser: ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument(
        "-o", "--output", type=Path, help="list to write; by default MANIFEST.problems.jsonl, or problems.jsonl here"
    )
    add_processes(parser)
    add_part(parser)


def run(options: Namespace) -> int:
    from data_pipelines.shards.problems import advice, write_problems
    from data_pipelines.tools.sources import Part, name_sources
    from data_pipelines.tools.verify import verify

    part = Part.parse(options.shard)
    sources = part.of(name_sources(options.sources))
    first = Path(options.sources[0])
    beside = first.with_name(f"{first.stem}.problems.jsonl") if first.suffix == ".json" else Path("problems.jsonl")
    listing = part.file(options.output or beside)
    start = time.perf_counter()
    with progress_bar("verifying", len(sources), "shards") as advance:
        found = verify(sources, processes=options.processes, on_shard=advance)
    passed_s = time.perf_counter() - start
    write_problems(listing, found.problems)
    speed = f"{found.samples / passed_s:,.0f} samples/s, {found.bytes / passed_s / 1e6:,.0f} MB/s"
    read = f"{counted(found.samples, 'sample')} in {counted(found.shards, 'shard')}"
    print(f"{read}: {counted(len(found.problems), 'problem')} ({speed})")
    if found.left_out:
        print(f"{counted(found.left_out, 'sample')} that the manifest leaves out were not read")
    if found.without_sum:
        print(
            f"{counted(found.without_sum, 'shard')} without a checksum to compare with: what still decodes is taken as "
            f"right; `index --checksums` keeps them."
        )
    if not found.problems:
        return 0
    print_counts(Counter(problem.reason for problem in found.problems), "reason", "problems")
    print_advice(found.problems, advice, OUT)
    print(f"{listing} lists them. `python -m data_pipelines index ... --exclude {listing}` leaves out the samples")
    print("that it names, and as a whole each shard that it lists without a key.")
    return 4
