"""Reads headers and .txt of every shard once, leaves out samples without an image or a caption, and says which. Filters
read whole samples. What was read is kept in a folder beside the manifest, so that a second run, after an interruption
or with other thresholds, takes seconds.
"""

import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from dataclasses import fields
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.text import counted
from data_pipelines.tools.console import ERR, print_advice, print_reasons, progress_bar
from data_pipelines.tools.options import add_processes, at_least

HELP = "write the manifest of existing shards (from img2dataset, say)"
EXAMPLES = (
    "'data/web/{00000..00099}.tar' -o data/web/manifest.json",
    "data/web -o data/web/clean.json --min-size 200 --unique image --min-score similarity=0.28",
    "s3://bucket/web/*.tar -o data/web/remote.json --checksums",
)


def add_arguments(parser: ArgumentParser) -> None:
    places = "files, folders, globs, 'a/{00000..00099}.tar', https://, s3://, gs://"
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help=places)
    parser.add_argument("-o", "--output", type=_path, required=True, help="manifest to write, such as manifest.json")
    add_processes(parser)
    parser.add_argument("--checksums", action="store_true", help="keep each shard's SHA-256, for `verify` and caches")
    parser.add_argument("--strict", action="store_true", help="a shard that is damaged or cut short is an error")
    parser.add_argument(
        "--trust-stats", action="store_true", help="take counts from img2dataset's _stats.json or parquet; read no tar"
    )
    filters = parser.add_argument_group("filters")
    filters.add_argument("--min-size", type=at_least(0), default=0, metavar="PIXELS", help="of the shorter side")
    filters.add_argument("--max-aspect", type=_ratio, default=0.0, metavar="RATIO", help="longer over shorter side")
    filters.add_argument("--caption-characters", type=_range, metavar="FEWEST:MOST", help="of the first caption")
    filters.add_argument("--language", type=_language, metavar="FIELD=en,zh", help="json field and values to keep")
    filters.add_argument("--min-score", type=_score, metavar="FIELD=0.28", help="json field and least value")
    filters.add_argument("--uids", type=Path, metavar="FILE.npy", help="keep these uids, as DataComp lists them")
    filters.add_argument(
        "--unique", action="append", default=[], choices=("image", "caption", "pair"), help="keep the first of equals"
    )
    filters.add_argument(
        "--exclude", type=Path, metavar="FILE.jsonl", help="samples and whole shards that a run or `verify` listed"
    )


def run(options: Namespace) -> None:
    from data_pipelines.shards.filters import Filters
    from data_pipelines.shards.index import build_manifest, count_from_stats
    from data_pipelines.shards.problems import advice, write_problems
    from data_pipelines.shards.tar import printable
    from data_pipelines.storage.files import describe, expand, is_remote, shown

    shards = expand(options.shards)
    if is_remote(shards[0]):
        describe(shards[0])  # tells of a mistyped server in 30 s, where a scan has patience for five minutes
    listing = options.output.with_name(f"{options.output.stem}.dropped.jsonl")
    listing.unlink(missing_ok=True)
    options.unique = frozenset(options.unique)
    filters = Filters(**{each.name: getattr(options, each.name) for each in fields(Filters)})
    if options.trust_stats and (filters != Filters() or options.checksums):
        raise DataError(
            "--trust-stats reads no sample, so that neither filters nor --checksums can be applied: leave it or "
            "them out."
        )
    if options.trust_stats:
        with progress_bar("reading counts", len(shards), "shards") as advance:
            manifest = count_from_stats(shards, options.output, on_shard=advance)
        manifest.save()
        number = counted(manifest.samples, "sample")
        print(f"{options.output}: {number} in {counted(len(shards), 'shard')}, as their makers counted")
        return
    with progress_bar("reading shards", len(shards), "shards") as advance:
        manifest, report = build_manifest(
            shards,
            options.output,
            filters=filters,
            checksums=options.checksums,
            processes=options.processes,
            on_shard=advance,
        )
    faults = report.faults + report.replaced
    if faults:
        write_problems(listing, faults)
    if options.strict and report.broken:
        print_advice(report.broken, advice, ERR)
        raise DataError(
            f"{counted(len(report.broken), 'shard')} of {len(shards):,} are not whole or not what they were, listed in "
            f"{listing}: no manifest was written. Mend them, leave them out, or index without --strict."
        )
    manifest.save()
    print(f"{options.output}: {counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}")
    if report.reused:
        print(f"{report.reused:,} of these shards had been scanned before")
    if report.left_out:
        print(f"{counted(len(report.left_out), 'shard')} left out, which {options.exclude} lists as a whole")
    print_reasons(Counter(fault.reason for fault in faults), f"left out with a fault, listed in {listing}")
    print_advice(faults, advice, ERR)
    print_reasons(report.filtered, "samples filtered out")
    if report.unmatched:
        shard, key = report.unmatched[0]
        what = f"{printable(key)} in {shown(shard)}" if key else shown(shard)
        print(
            f"{len(report.unmatched):,} of the entries of {options.exclude} are not in these shards; the first is "
            f"{what}: see that the list is of the same data.",
            file=sys.stderr,
        )


def _ratio(text: str) -> float:
    ratio = _number(text, "a number such as 3")
    if not ratio >= 1:
        raise ArgumentTypeError(f"give 1 or more, not {text}: the longer side is never below the shorter")
    return ratio


def _path(text: str) -> Path:
    if not text.endswith(".json"):  # which is how tools tell it from shards
        raise ArgumentTypeError(f"give a name that ends in .json, not {text}")
    return Path(text)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ArgumentTypeError(f"write FIELD=VALUE, not {text!r}")
    return name, value


def _language(text: str) -> tuple[str, frozenset[str]]:
    name, values = _assignment(text)
    return name, frozenset(values.split(","))


def _score(text: str) -> tuple[str, float]:
    name, value = _assignment(text)
    number = _number(value, "FIELD=NUMBER, such as similarity=0.28")
    if not math.isfinite(number):
        raise ArgumentTypeError(f"give a number, not {value}: no score is above or below it")
    return name, number


def _number(text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"write {wanted}, not {text!r}") from None


def _range(text: str) -> tuple[int, int]:
    fewest, colon, most = text.partition(":")
    try:
        return int(fewest or 0), int(most or sys.maxsize) if colon else int(fewest)
    except ValueError:
        raise ArgumentTypeError(f"write FEWEST:MOST, as in 5:1000, not {text!r}") from None
