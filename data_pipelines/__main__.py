"""`python -m data_pipelines`: make, index and look after the data of a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.errors import DataError, UserError

_CONSOLE = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, or that of the user's error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _demo(options: argparse.Namespace) -> None:
    from data_pipelines.demo import Demo

    demo = Demo(options.train, options.heldout, options.size, options.vocab_size, options.seed)
    if demo.is_complete(options.out):
        print(f"{options.out} is already complete.")
        return
    with _progress("drawing scenes", demo.num_shards, "shards") as advance:
        demo.make(options.out, processes=len(os.sched_getaffinity(0)), on_shard=advance)
    print(f"{options.out}: {options.train:,} training and {options.heldout:,} held-out samples, tokenizer.model")


def _pack(options: argparse.Namespace) -> None:
    from data_pipelines.pack import pack

    with _progress("packing", None, "rows") as advance:
        packed = pack(
            options.source,
            options.out,
            image_column=options.image_column,
            caption_column=options.caption_column,
            samples_per_shard=options.samples_per_shard,
            on_row=advance,
        )
    shards = len(packed.manifest.shards)
    print(f"{options.out / 'manifest.json'}: {packed.good:,} samples in {shards:,} shards")
    _print_reasons(packed.rejected, f"rejected rows, listed in {options.out / 'rejected.jsonl'}")


def _index(options: argparse.Namespace) -> None:
    from data_pipelines.index import build_manifest, count_from_stats
    from data_pipelines.storage import expand

    shards = expand(options.shards)
    listing = options.output.with_name(f"{options.output.stem}.dropped.jsonl")
    listing.unlink(missing_ok=True)
    if options.trust_stats:
        with _progress("reading counts", len(shards), "shards") as advance:
            manifest = count_from_stats(shards, options.output, on_shard=advance)
        manifest.save()
        print(f"{options.output}: {manifest.samples:,} samples in {len(shards):,} shards, as their makers counted")
        return
    with _progress("reading shards", len(shards), "shards") as advance:
        manifest, report = build_manifest(
            shards,
            options.output,
            filters=_filters(options),
            checksums=options.checksums,
            processes=options.processes,
            on_shard=advance,
        )
    manifest.save()
    print(f"{options.output}: {manifest.samples:,} samples in {len(shards):,} shards")
    if report.reused:
        print(f"{report.reused:,} of these shards had been scanned before")
    if report.faults:
        lines = (json.dumps(asdict(drop), ensure_ascii=False) for drop in report.faults)
        listing.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
        _print_reasons(Counter(drop.reason for drop in report.faults), f"samples with a fault, listed in {listing}")
    _print_reasons(report.filtered, "samples filtered out")


def _filters(options: argparse.Namespace):
    from data_pipelines.filters import Filters

    language, score = options.language, options.min_score
    return Filters(
        min_size=options.min_size,
        max_aspect=options.max_aspect,
        caption_characters=options.caption_characters,
        language=(language[0], frozenset(language[1].split(","))) if language else None,
        min_score=(score[0], _number(score[1])) if score else None,
        uids=options.uids,
        unique=frozenset(options.unique),
        exclude=options.exclude,
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"write FIELD=VALUE, not {text!r}")
    return name, value


def _range(text: str) -> tuple[int, int]:
    fewest, colon, most = text.partition(":")
    try:
        return int(fewest or 0), int(most or sys.maxsize) if colon else int(fewest)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write FEWEST:MOST, as in 5:1000, not {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"--min-score {text} is no number: write FIELD=NUMBER, such as similarity=0.28.") from None


def _tokenizer(options: argparse.Namespace) -> None:
    from data_pipelines.manifest import Manifest
    from data_pipelines.reader import iter_captions
    from data_pipelines.tokenizer import SentencePieceTokenizer, export_tokenizer, train_sentencepiece

    with _progress("reading captions", None, "captions") as advance:

        def captions() -> Iterator[str]:
            for caption in iter_captions(Manifest.load(options.manifest)):
                advance()
                yield caption

        train_sentencepiece(captions(), options.output, options.vocab_size)
    print(f"{options.output}: {SentencePieceTokenizer(options.output).vocab_size:,} pieces")
    if options.export:
        export_tokenizer(options.output, options.export)
        print(f"{options.export}: the same as a Hugging Face tokenizer")


def _print_reasons(reasons: Counter[str], title: str) -> None:
    if reasons:
        _CONSOLE.print(f"{title}:", soft_wrap=True, highlight=False)
        table = Table()
        table.add_column("reason")
        table.add_column("count", justify="right")
        for reason, count in reasons.most_common():
            table.add_row(reason, f"{count:,}")
        _CONSOLE.print(table)


@contextmanager
def _progress(title: str, total: int | None, unit: str):
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Progress(*columns, console=_CONSOLE) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines",
        description="Prepare image-text data for pretraining. Shards are plain WebDataset tars: key.jpg, key.txt "
        "and, if you like, key.json. A manifest lists them once and for all; training reads the manifest.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plain = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser(
        "demo", formatter_class=plain, help="draw a small corpus to try everything with (half a minute)"
    )
    demo.description = "Draws scenes of two coloured shapes with captions that say how they stand to each other."
    demo.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    demo.add_argument("--train", type=int, default=20_000, help="training samples")
    demo.add_argument("--heldout", type=int, default=512, help="held-out samples")
    demo.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    demo.add_argument("--vocab-size", type=int, default=512, help="pieces of the tokenizer, at most")
    demo.add_argument("--seed", type=int, default=0, help="another seed draws another corpus")
    demo.set_defaults(run=_demo)

    pack = commands.add_parser(
        "pack", formatter_class=plain, help="turn a folder or a table of images and captions into shards"
    )
    pack.description = (
        "SOURCE is a folder of images, each with a .txt of the same name, or a .csv, .tsv, .jsonl or .parquet with a "
        "column of image paths and one of captions. Rows that cannot be used are listed in OUT/rejected.jsonl."
    )
    pack.add_argument("source", type=Path, metavar="SOURCE", help="folder or table")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for the shards and their manifest")
    pack.add_argument("--image-column", default="image", help="column of paths, absolute or relative to the table")
    pack.add_argument("--caption-column", default="caption", help="column of captions; the others become json")
    pack.add_argument("--samples-per-shard", type=int, default=10_000, help="a shard of 10,000 is about 300 MB")
    pack.set_defaults(run=_pack)

    index = commands.add_parser(
        "index", formatter_class=plain, help="write the manifest of existing shards (from img2dataset, say)"
    )
    index.description = (
        "Reads the headers of every shard once, leaves out samples without an image or a caption, and says which. "
        "Filters read whole samples. What was read is kept in a folder beside the manifest, so that a second run, "
        "after an interruption or with other thresholds, takes seconds."
    )
    index.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="files, folders, globs, 'a/{00000..00099}.tar', https://, s3://, gs://",
    )
    index.add_argument("-o", "--output", type=Path, required=True, help="manifest to write, such as manifest.json")
    index.add_argument("--processes", type=int, help="scanning at the same time; by default one a core")
    index.add_argument("--checksums", action="store_true", help="keep each shard's SHA-256, for `verify` and caches")
    index.add_argument(
        "--trust-stats", action="store_true", help="take counts from img2dataset's _stats.json or parquet; read no tar"
    )
    filters = index.add_argument_group("filters")
    filters.add_argument("--min-size", type=int, default=0, metavar="PIXELS", help="of the shorter side")
    filters.add_argument("--max-aspect", type=float, default=0.0, metavar="RATIO", help="longer over shorter side")
    filters.add_argument("--caption-characters", type=_range, metavar="FEWEST:MOST", help="of the first caption")
    filters.add_argument("--language", type=_assignment, metavar="FIELD=en,zh", help="json field and values to keep")
    filters.add_argument("--min-score", type=_assignment, metavar="FIELD=0.28", help="json field and least value")
    filters.add_argument("--uids", type=Path, metavar="FILE.npy", help="keep these uids, as DataComp lists them")
    filters.add_argument(
        "--unique", action="append", default=[], choices=("image", "caption", "pair"), help="keep the first of equals"
    )
    filters.add_argument("--exclude", type=Path, metavar="FILE.jsonl", help="bad samples that a run or `verify` listed")
    index.set_defaults(run=_index)

    tokenizer = commands.add_parser(
        "tokenizer", formatter_class=plain, help="train a tokenizer on the captions of a manifest"
    )
    tokenizer.description = "Trains a sentencepiece model with the special tokens that pretraining needs."
    tokenizer.add_argument("manifest", type=Path, metavar="MANIFEST", help="of the training shards")
    tokenizer.add_argument("-o", "--output", type=Path, required=True, help="model to write, such as tokenizer.model")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="pieces, at most: 30000 suits web captions")
    tokenizer.add_argument("--export", type=Path, help="folder for the same as a Hugging Face tokenizer")
    tokenizer.set_defaults(run=_tokenizer)
    return parser


if __name__ == "__main__":
    sys.exit(main())
