"""Trains a config on the processes that torchrun started, or on this one. The same command goes on with a run that was
stopped.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pretrain.stopping import Stop

HELP = "train a config; start it with torchrun or `python -m launch local`"
EXAMPLES = (
    "python -m launch local configs/small.yaml training.steps=1000",
    "torchrun --nproc-per-node 8 -m pretrain train configs/base.yaml",
    "configs/demo.yaml engine.zero_stage=0",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")


def run(options: Namespace) -> None:
    stop = Stop()
    with stop.interrupting():
        from pretrain import train
    train.main(options.config, options.overrides, stop)
