"""Show what a run's newest job has printed."""

import os
from argparse import ArgumentParser, Namespace

HELP = "show what a run's newest job has printed"
EXAMPLES = ("runs/base --follow",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_or_job", metavar="RUN", help="a run's output folder, or a job's number")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until Ctrl-C")


def run(options: Namespace) -> None:
    from data_pipelines.errors import UserError
    from launch.status import find_run

    folder = find_run(options.run_or_job)
    logs = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise UserError(f"{folder / 'logs'} holds no log: the run has not begun.")
    os.execvp("tail", ["tail", *(["-F"] if options.follow else []), "-n", "1000", str(logs[-1])])
