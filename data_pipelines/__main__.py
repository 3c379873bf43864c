"""`python -m data_pipelines`: make, index and look after the data of a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.errors import UserError

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
    _print_reasons(packed.rejected, "rejected rows", options.out / "rejected.jsonl")


def _index(options: argparse.Namespace) -> None:
    from data_pipelines.index import build_manifest, expand_shards

    shards = expand_shards(options.shards)
    with _progress("reading headers", len(shards), "shards") as advance:
        manifest, dropped = build_manifest(shards, options.output, on_shard=lambda shard: advance())
    manifest.save(options.output)
    print(f"{options.output}: {manifest.samples:,} samples in {len(shards):,} shards")
    report = options.output.with_name(f"{options.output.stem}.dropped.jsonl")
    report.unlink(missing_ok=True)
    if dropped:
        lines = (json.dumps({"shard": drop.shard, "key": drop.key, "reason": drop.reason}) for drop in dropped)
        report.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _print_reasons(Counter(drop.reason for drop in dropped), "samples left out", report)


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


def _print_reasons(reasons: Counter[str], title: str, report: Path) -> None:
    if reasons:
        _CONSOLE.print(f"{title}, listed in {report}:", soft_wrap=True, highlight=False)
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
        "Reads the headers of every shard once, leaves out samples without an image or a caption, and says which."
    )
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="files, folders, globs, or 'a/{00000..00099}.tar'")
    index.add_argument("-o", "--output", type=Path, required=True, help="manifest to write, such as manifest.json")
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
