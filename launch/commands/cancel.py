"""Stop a run: it finishes its step, saves and leaves, and its job is not requeued. A job that still waits in the queue
is removed from it.
"""

from argparse import ArgumentParser, Namespace

HELP = "stop a run, which saves first"
EXAMPLES = ("runs/base", "runs/base --now")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_or_job", metavar="RUN", help="a run's output folder, or a job's number")
    parser.add_argument("--now", action="store_true", help="without saving: the newest checkpoint stays")


def run(options: Namespace) -> None:
    from launch.jobs import cancel
    from launch.status import find_run

    print(cancel(find_run(options.run_or_job), now=options.now))
