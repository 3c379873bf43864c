"""Scores a run on held-out data, on the processes that torchrun started, or on this one."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "retrieval, zero-shot, matching, masked-LM and captioning accuracy of a run"
EXAMPLES = ("runs/base", "runs/base --split data/flickr/manifest.json --rerank 32")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="run", help="the run's output folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.tokenizer=PATH in a moved run")
    parser.add_argument("--split", default="heldout", help="heldout (data.heldout), or another manifest")
    parser.add_argument("--step", type=int, help="of the checkpoint; without it the newest valid one")
    parser.add_argument("--rerank", type=int, default=16, help="candidates that matching ranks again, 0 for none")


def run(options: Namespace) -> None:
    from pretrain import evaluate

    evaluate.main(options.run_folder, options.split, options.rerank, step=options.step, overrides=options.overrides)
