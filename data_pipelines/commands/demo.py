"""Draws scenes of two coloured shapes with captions that say how they stand to each other."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from data_pipelines.tools.console import progress_bar
from data_pipelines.tools.options import at_least

HELP = "draw a small corpus to try everything with (half a minute)"
EXAMPLES = ("data/demo", "data/small --train 1000 --size 32")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--train", type=at_least(1), default=20_000, help="training samples")
    parser.add_argument("--heldout", type=at_least(1), default=512, help="held-out samples")
    parser.add_argument("--size", type=at_least(1), default=64, help="side of the pictures in pixels")
    parser.add_argument("--vocab-size", type=at_least(6), default=512, help="pieces of the tokenizer, at most")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another corpus")


def run(options: Namespace) -> None:
    from data_pipelines.demo.corpus import Demo

    demo = Demo(options.train, options.heldout, options.size, options.vocab_size, options.seed)
    if demo.is_complete(options.out):
        print(f"{options.out} is already complete.")
        return
    with progress_bar("drawing scenes", demo.num_shards, "shards") as advance:
        demo.make(options.out, processes=len(os.sched_getaffinity(0)), on_shard=advance)
    print(f"{options.out}: {options.train:,} training and {options.heldout:,} held-out samples, tokenizer.model")
