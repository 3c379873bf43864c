"""Writes a copy of the tokenizer in which [PAD], [UNK], [CLS], [SEP] and [MASK] have ids of their own. Tokens that are
missing get the ids after the last.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "give a Hugging Face tokenizer the special tokens that pretraining needs"
EXAMPLES = ("models/bert-base-chinese -o data/pairs/tokenizer",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as `save_pretrained` writes it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder to write")


def run(options: Namespace) -> None:
    from data_pipelines.samples.tokenizer import Tokenizer, adopt_tokenizer

    added = adopt_tokenizer(options.folder, options.output)
    size = Tokenizer.load(options.output).vocab_size
    print(f"{options.output}: {size:,} pieces; {', '.join(added) if added else 'no token'} was added")
