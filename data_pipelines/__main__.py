"""`python -m data_pipelines`: make, index and look after the data of a run."""

import argparse
import os
import sys
from io import TextIOWrapper

from data_pipelines.command_line import parser_of
from data_pipelines.errors import UserError, cannot_write


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `run` does what the command is for."""
    return parser_of(
        "data_pipelines",
        "Prepare image-text data for pretraining. Shards are plain WebDataset tars: key.jpg, key.txt and, if you like, "
        "key.json. A manifest lists them once and for all; training reads the manifest.",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, the user's error's, 130 after Ctrl-C, or 141 if nobody reads on."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at exit
        return 141
    except (UserError, OSError) as error:
        if isinstance(error, OSError):  # what is read has said so in words of its own
            error = cannot_write(str(error.filename or "the result"), error)
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
