"""The command line: `python -m launch --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start a run.")
    commands = parser.add_subparsers(dest="command", required=True)

    local = commands.add_parser(
        "local",
        help="train on this machine",
        description="Train on this machine: one process a GPU, or two on the CPU when there is none.",
    )
    local.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    local.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    local.add_argument("--nproc", type=positive, metavar="N", help="number of processes")
    local.add_argument("--dry-run", action="store_true", help="print the command and stop")

    # argparse gives up on positional arguments that follow an option: `local CONFIG --nproc 4 key=value`.
    arguments, late = parser.parse_known_args(argv)
    unknown = [word for word in late if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {' '.join(unknown)}")
    overrides = [*arguments.overrides, *late]

    # Imported this late so that --help need not wait for the config's own imports.
    from data_pipelines.errors import UserError
    from launch.local import run_local

    try:
        run_local(arguments.config, overrides, arguments.nproc, arguments.dry_run)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def positive(text: str) -> int:
    """Read a number of processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
