"""Trains a sentencepiece model with the special tokens that pretraining needs."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from data_pipelines.tools.options import at_least

HELP = "train a tokenizer on the captions of a manifest"
EXAMPLES = ("data/pairs/train/manifest.json -o data/pairs/tokenizer.model --vocab-size 30000",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="of the training shards")
    parser.add_argument("-o", "--output", type=Path, required=True, help="model to write, such as tokenizer.model")
    parser.add_argument(
        "--vocab-size", type=at_least(6), required=True, help="pieces, at most; 30000 suits web captions"
    )
    parser.add_argument("--export", type=Path, help="folder for the same as a Hugging Face tokenizer")


def run(options: Namespace) -> None:
    from data_pipelines.samples.tokenizer import SentencePieceTokenizer, export_tokenizer, train_sentencepiece
    from data_pipelines.tools.captions import read_captions

    with read_captions(options.manifest) as captions:
        train_sentencepiece(captions, options.output, options.vocab_size)
    pieces = SentencePieceTokenizer(options.output).vocab_size
    print(f"{options.output}: {pieces:,} pieces")
    if pieces < options.vocab_size:
        print(
            f"Fewer than the {options.vocab_size:,} asked for: every word of these captions is a piece by now, or some "
            f"pieces of 16 characters, the longest there are. Only more captions make more pieces."
        )
    if options.export:
        export_tokenizer(options.output, options.export)
        print(f"{options.export}: the same as a Hugging Face tokenizer")
