"""Say how a run is: its job, step, loss, speed, newest checkpoint, and the time that is left. It reads the run's
folder, and asks Slurm about a job that `launch slurm` submitted.
"""

import time
from argparse import ArgumentParser, Namespace

HELP = "say how a run is"
EXAMPLES = ("runs/base", "runs/base --watch", "1234")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_or_job", metavar="RUN", help="a run's output folder, or a job's number")
    parser.add_argument("--watch", action="store_true", help="again every five seconds, until Ctrl-C")


def run(options: Namespace) -> None:
    from launch.status import find_run, report

    folder = find_run(options.run_or_job)
    if not options.watch:
        print("\n".join(report(folder)))
        return
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(Text("\n".join(report(folder))), auto_refresh=False) as live:
            while True:
                live.update(Text("\n".join(report(folder))), refresh=True)
                time.sleep(5)
    except KeyboardInterrupt:
        return
