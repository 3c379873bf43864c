"""The command line: `python -m launch --help`."""

import argparse
import sys
from collections.abc import Sequence

from data_pipelines.command_line import parse, parser_of
from data_pipelines.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `run` does what the command is for."""
    return parser_of("launch", "Start a run, or plan one.")


def main(argv: Sequence[str]) -> int:
    options = parse(parser(), argv)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
