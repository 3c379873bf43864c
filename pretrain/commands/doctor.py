"""Trains a small copy of the config on made-up samples, as the config lays it out and in one process, compares losses
and gradient norms, and measures links and processors. Exits with 7 on a difference.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "compare a config's layout with one process, and measure ranks and links; start it with torchrun"
EXAMPLES = (
    "python -m launch local configs/base.yaml --doctor",
    "torchrun --nproc-per-node 8 -m pretrain doctor configs/base.yaml engine.tensor_parallel=2",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file; its data need not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.tensor_parallel=2")


def run(options: Namespace) -> None:
    from pretrain import doctor

    doctor.main(options.config, options.overrides)
