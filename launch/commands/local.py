"""Train on this machine: one process per GPU, or two on the CPU when there is none. The same command goes on with a run
that was stopped.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from launch.commands import not_negative, positive

HELP = "train on this machine"
EXAMPLES = (
    "configs/small.yaml data.workers=4 optimizer.learning_rate=1e-4",
    "configs/base.yaml --doctor engine.tensor_parallel=2",
)

# What bounds restarts is progress (launch/agent.py): three without a new checkpoint end a run. A run of weeks may well
# fail a hundred times in between.
MAX_RESTARTS = 100


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--nproc", type=positive, metavar="N", help="number of processes")
    parser.add_argument(
        "--max-restarts",
        type=not_negative,
        default=MAX_RESTARTS,
        metavar="N",
        help="how often ranks that failed are started again, at most; three times in a row without a new checkpoint",
    )
    parser.add_argument("--doctor", action="store_true", help="compare the layout with one process, and do not train")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")


def run(options: Namespace) -> None:
    from launch.local import run_local

    command = "doctor" if options.doctor else "train"
    run_local(options.config, options.overrides, options.nproc, options.dry_run, command, options.max_restarts)
