"""Lists a run's checkpoints; exits with 3 if one of them is not valid."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "list a run's checkpoints, verify, prune, pin and compare them"
EXAMPLES = (
    "runs/base",
    "runs/base --verify",
    "runs/base --prune --keep 2",
    "runs/base --diff 1000 runs/other/checkpoints/step-000001000",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="run", help="the run's output folder")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="hash every byte; without it, sizes are compared")
    action.add_argument("--prune", action="store_true", help="remove what the run's own rule does not keep")
    action.add_argument("--pin", type=int, metavar="STEP", help="let this one stay whatever comes after it")
    action.add_argument("--unpin", type=int, metavar="STEP", help="no longer")
    action.add_argument("--diff", nargs=2, metavar=("A", "B"), help="in what two differ, each a step or a folder")
    parser.add_argument("--keep", type=int, metavar="N", help="with --prune: instead of the run's checkpoint.keep")


def run(options: Namespace) -> None:
    from pretrain import checkpoints

    checkpoints.main(options)
