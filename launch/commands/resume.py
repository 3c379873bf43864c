"""Submit a run again: the config that was submitted last, from the newest checkpoint, on other nodes or in another
layout if you like.
"""

from argparse import ArgumentParser, Namespace

from launch.commands.slurm import add_options, start

HELP = "submit a run again, on other nodes if you like"
EXAMPLES = ("runs/base", "runs/base --nodes 2 engine.tensor_parallel=2")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_or_job", metavar="RUN", help="a run's output folder, or a job's number")
    add_options(parser)


def run(options: Namespace) -> None:
    from launch.slurm import last_submitted
    from launch.status import find_run

    config, words = last_submitted(find_run(options.run_or_job))
    start(config, words, options)
