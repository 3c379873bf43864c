"""The words of `python -m data_pipelines`: commands, options and their help. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from data_pipelines.help_text import HelpFormatter, examples


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `command` is the name of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines",
        description="Prepare image-text data for pretraining. Shards are plain WebDataset tars: key.jpg, key.txt "
        "and, if you like, key.json. A manifest lists them once and for all; training reads the manifest.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_demo, _pack, _index, _verify, _stats, _inspect, _reshard, _tokenizer, _adopt, _coverage):
        add(commands)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, help: str, description: str) -> argparse.ArgumentParser:
    epilog = examples(*(f"python -m data_pipelines {name} {words}" for words in _EXAMPLES[name]))
    return commands.add_parser(name, formatter_class=HelpFormatter, help=help, description=description, epilog=epilog)


_EXAMPLES = {
    "demo": ("data/demo", "data/small --train 1000 --size 32"),
    "pack": (
        "captions.csv data/pairs/train --image-column path --caption-column text",
        "photos/ data/photos",
    ),
    "index": (
        "'data/web/{00000..00099}.tar' -o data/web/manifest.json",
        "data/web -o data/web/clean.json --min-size 200 --unique image --min-score similarity=0.28",
        "s3://bucket/web/*.tar -o data/web/remote.json --checksums",
    ),
    "verify": ("data/web/manifest.json",),
    "stats": ("data/web/manifest.json --sample 10000", "--merge stats.0-of-2.npz stats.1-of-2.npz"),
    "inspect": ("data/web/manifest.json -o report",),
    "reshard": ("data/web/manifest.json -o data/shuffled --samples-per-shard 10000",),
    "tokenizer": ("data/pairs/train/manifest.json -o data/pairs/tokenizer.model --vocab-size 30000",),
    "adopt": ("models/bert-base-chinese -o data/pairs/tokenizer",),
    "coverage": ("data/pairs/tokenizer.model data/pairs/train/manifest.json",),
}


def _demo(commands: argparse._SubParsersAction) -> None:
    demo = _add(
        commands,
        "demo",
        "draw a small corpus to try everything with (half a minute)",
        "Draws scenes of two coloured shapes with captions that say how they stand to each other.",
    )
    demo.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    demo.add_argument("--train", type=_at_least(1), default=20_000, help="training samples")
    demo.add_argument("--heldout", type=_at_least(1), default=512, help="held-out samples")
    demo.add_argument("--size", type=_at_least(1), default=64, help="side of the pictures in pixels")
    demo.add_argument("--vocab-size", type=_at_least(6), default=512, help="pieces of the tokenizer, at most")
    demo.add_argument("--seed", type=int, default=0, help="another seed draws another corpus")


def _pack(commands: argparse._SubParsersAction) -> None:
    pack = _add(
        commands,
        "pack",
        "turn a folder or a table of images and captions into shards",
        "SOURCE is a folder of images (JPEG, PNG or WebP), each with a .txt of the same name, or a .csv, .tsv, .jsonl "
        "or .parquet with a column of image paths (of parquet, also image bytes) and one of captions. Rows that cannot "
        "be used, images of other formats among them, are listed in OUT/rejected.jsonl.",
    )
    pack.add_argument("source", type=Path, metavar="SOURCE", help="folder or table")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder for the shards and their manifest")
    pack.add_argument("--image-column", default="image", help="column of paths, absolute or relative to the table")
    pack.add_argument("--caption-column", default="caption", help="column of captions; the others become json")
    pack.add_argument(
        "--samples-per-shard", type=_at_least(1), default=10_000, help="a shard of 10,000 is about 300 MB"
    )
    pack.add_argument(
        "--heldout",
        type=_at_least(1),
        metavar="NUMBER",
        help="samples to set apart by a hash of the image, into OUT/heldout beside OUT/train",
    )
    pack.add_argument("--label-column", help="column of classes, for OUT/heldout/prompts.json")


def _index(commands: argparse._SubParsersAction) -> None:
    index = _add(
        commands,
        "index",
        "write the manifest of existing shards (from img2dataset, say)",
        "Reads headers and .txt of every shard once, leaves out samples without an image or a caption, and says which. "
        "Filters read whole samples. What was read is kept in a folder beside the manifest, so that a second run, "
        "after an interruption or with other thresholds, takes seconds.",
    )
    index.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="files, folders, globs, 'a/{00000..00099}.tar', https://, s3://, gs://",
    )
    index.add_argument("-o", "--output", type=_manifest, required=True, help="manifest to write, such as manifest.json")
    _processes(index)
    index.add_argument("--checksums", action="store_true", help="keep each shard's SHA-256, for `verify` and caches")
    index.add_argument("--strict", action="store_true", help="a shard that is damaged or cut short is an error")
    index.add_argument(
        "--trust-stats", action="store_true", help="take counts from img2dataset's _stats.json or parquet; read no tar"
    )
    filters = index.add_argument_group("filters")
    filters.add_argument("--min-size", type=_at_least(0), default=0, metavar="PIXELS", help="of the shorter side")
    filters.add_argument("--max-aspect", type=_ratio, default=0.0, metavar="RATIO", help="longer over shorter side")
    filters.add_argument("--caption-characters", type=_range, metavar="FEWEST:MOST", help="of the first caption")
    filters.add_argument("--language", type=_assignment, metavar="FIELD=en,zh", help="json field and values to keep")
    filters.add_argument("--min-score", type=_score, metavar="FIELD=0.28", help="json field and least value")
    filters.add_argument("--uids", type=Path, metavar="FILE.npy", help="keep these uids, as DataComp lists them")
    filters.add_argument(
        "--unique", action="append", default=[], choices=("image", "caption", "pair"), help="keep the first of equals"
    )
    filters.add_argument(
        "--exclude", type=Path, metavar="FILE.jsonl", help="samples and whole shards that a run or `verify` listed"
    )


def _verify(commands: argparse._SubParsersAction) -> None:
    verify = _add(
        commands,
        "verify",
        "read every byte as training would, and list what is wrong",
        "Checks sizes and, where the manifest has them, checksums; compares the index with the shards; decodes every "
        "image and reads every caption. What is wrong is listed one line a problem; `index --exclude` reads the list. "
        "Exit code 4 where there is any.",
    )
    _sources(verify)
    verify.add_argument(
        "-o", "--output", type=Path, help="list to write; by default MANIFEST.problems.jsonl, or problems.jsonl here"
    )
    _processes(verify)
    _part(verify)


def _stats(commands: argparse._SubParsersAction) -> None:
    stats = _add(
        commands,
        "stats",
        "count sizes, lengths, formats, scripts and duplicates",
        "Counts over all samples, or over some spread evenly. Images are not decoded; of several captions the first "
        "counts. With --shard each part writes what it counted, and --merge adds the parts up exactly.",
    )
    what = stats.add_mutually_exclusive_group(required=True)
    what.add_argument("sources", nargs="*", default=[], metavar="SOURCES", help=_SOURCES)
    what.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="parts to add up, instead of sources")
    stats.add_argument("-o", "--output", type=Path, default=Path("stats.json"), help="file to write")
    stats.add_argument("--sample", type=_at_least(1), metavar="NUMBER", help="read so many samples only")
    stats.add_argument("--language-field", default="", metavar="FIELD", help="of json; counted besides the scripts")
    _processes(stats)
    _part(stats)


def _inspect(commands: argparse._SubParsersAction) -> None:
    inspect = _add(
        commands,
        "inspect",
        "show samples, histograms, duplicates and problems as a page to look at",
        "Writes FOLDER/report.html, which needs nothing else. The same call shows the same samples.",
    )
    _sources(inspect)
    inspect.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    inspect.add_argument("--samples", type=_at_least(1), default=64, help="to show, spread over all shards")
    inspect.add_argument("--seed", type=int, default=0, help="another seed shows other samples")
    _processes(inspect)


def _reshard(commands: argparse._SubParsersAction) -> None:
    reshard = _add(
        commands,
        "reshard",
        "shuffle everything into new shards of one size",
        "Shuffles all samples that the sources keep. Members stay as they are, byte for byte; a key that comes twice "
        "in a new shard gets the number of its source in front. An interrupted run goes on where it was. Without "
        "--shard the manifest is written, too.",
    )
    _sources(reshard)
    reshard.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the new shards")
    reshard.add_argument("--samples-per-shard", type=_at_least(1), default=10_000, help="the last shard may have fewer")
    reshard.add_argument("--seed", type=int, default=0, help="another seed gives another order")
    _processes(reshard)
    _part(reshard)


def _tokenizer(commands: argparse._SubParsersAction) -> None:
    tokenizer = _add(
        commands,
        "tokenizer",
        "train a tokenizer on the captions of a manifest",
        "Trains a sentencepiece model with the special tokens that pretraining needs.",
    )
    tokenizer.add_argument("manifest", type=Path, metavar="MANIFEST", help="of the training shards")
    tokenizer.add_argument("-o", "--output", type=Path, required=True, help="model to write, such as tokenizer.model")
    tokenizer.add_argument(
        "--vocab-size", type=_at_least(6), required=True, help="pieces, at most; 30000 suits web captions"
    )
    tokenizer.add_argument("--export", type=Path, help="folder for the same as a Hugging Face tokenizer")


def _adopt(commands: argparse._SubParsersAction) -> None:
    adopt = _add(
        commands,
        "adopt",
        "give a Hugging Face tokenizer the special tokens that pretraining needs",
        "Writes a copy of the tokenizer in which [PAD], [UNK], [CLS], [SEP] and [MASK] have ids of their own. Tokens "
        "that are missing get the ids after the last.",
    )
    adopt.add_argument("folder", type=Path, metavar="FOLDER", help="as `save_pretrained` writes it")
    adopt.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")


def _coverage(commands: argparse._SubParsersAction) -> None:
    coverage = _add(
        commands,
        "coverage",
        "measure how a tokenizer suits the captions of a manifest",
        "Counts pieces per caption, captions that are cut, and characters that are unknown.",
    )
    coverage.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help=".model, or folder of a Hugging Face one")
    coverage.add_argument("manifest", type=Path, metavar="MANIFEST", help="of the training shards")
    coverage.add_argument(
        "--text-length",
        type=_at_least(3),
        nargs="+",
        default=[24, 32, 64],
        metavar="TOKENS",
        help="of a caption, as `model.text.length` has them: 24 in size tiny, 32 in the others",
    )


_SOURCES = "manifest.json, or shards as `index` takes them: files, folders, globs, braces, URLs"


def _sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help=_SOURCES)


def _processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=_at_least(1), help="working at the same time; by default one a core")


def _part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard",
        metavar="NUMBER/COUNT",
        help="do this share only, from 0/COUNT on, as in --shard $SLURM_ARRAY_TASK_ID/8",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"give a whole number of {least} or more, not {text}")
        return int(text)

    return number


def _ratio(text: str) -> float:
    ratio = _number(text, "a number such as 3")
    if not ratio >= 1:
        raise argparse.ArgumentTypeError(f"give 1 or more, not {text}: the longer side is never below the shorter")
    return ratio


def _manifest(text: str) -> Path:
    if not text.endswith(".json"):  # which is how tools tell it from shards
        raise argparse.ArgumentTypeError(f"give a name that ends in .json, not {text}")
    return Path(text)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"write FIELD=VALUE, not {text!r}")
    return name, value


def _score(text: str) -> tuple[str, float]:
    name, value = _assignment(text)
    number = _number(value, "FIELD=NUMBER, such as similarity=0.28")
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"give a number, not {value}: no score is above or below it")
    return name, number


def _number(text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write {wanted}, not {text!r}") from None


def _range(text: str) -> tuple[int, int]:
    fewest, colon, most = text.partition(":")
    try:
        return int(fewest or 0), int(most or sys.maxsize) if colon else int(fewest)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write FEWEST:MOST, as in 5:1000, not {text!r}") from None
