"""Counts pieces per caption, captions that are cut, and characters that are unknown."""

from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

from rich.table import Table

from data_pipelines.tools.console import OUT, print_counts
from data_pipelines.tools.options import at_least

HELP = "measure how a tokenizer suits the captions of a manifest"
EXAMPLES = ("data/pairs/tokenizer.model data/pairs/train/manifest.json",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help=".model, or folder of a Hugging Face one")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="of the training shards")
    parser.add_argument(
        "--text-length",
        type=at_least(3),
        nargs="+",
        default=[24, 32, 64],
        metavar="TOKENS",
        help="of a caption, as `model.text.length` has them: 24 in size tiny, 32 in the others",
    )


def run(options: Namespace) -> None:
    from data_pipelines.samples.tokenizer import Tokenizer
    from data_pipelines.tools.captions import read_captions
    from data_pipelines.tools.coverage import coverage

    tokenizer = Tokenizer.load(options.tokenizer)
    with read_captions(options.manifest) as captions:
        found = coverage(tokenizer, captions, options.text_length)
    cut = [f"{share:.2%} at {most}" for share, most in zip(found.cut_shares, options.text_length, strict=True)]
    print(f"{found.captions:,} captions, of which are cut: {', '.join(cut)} tokens")
    table = Table("pieces per caption", "mean", "median", "p95", "p99", "most")
    lengths = (found.median_pieces, found.p95_pieces, found.p99_pieces, found.max_pieces)
    table.add_row("", f"{found.mean_pieces:.1f}", *map(str, lengths))
    OUT.print(table)
    per = {"word": found.pieces_per_word, "letter of scripts without spaces": found.pieces_per_unspaced_letter}
    for what, pieces in per.items():
        if pieces is not None:
            print(f"{pieces:.2f} pieces per {what}")
    print(f"{found.unknown_share:.3%} of the pieces are unknown; {found.vocabulary_share:.1%} of the vocabulary occurs")
    print_counts(Counter(dict(found.unknown_characters)), "unknown character", "times")
