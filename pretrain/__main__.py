"""`python -m pretrain COMMAND`: the command line.

Exit codes: 0 done, 3 no valid checkpoint, or one of another run, 4 configuration, data or disk, 5 too many bad steps, 7
a layout that does not equal one process, 85 stopped as asked, and saved what there was to save.
"""

import argparse
import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_pipelines.command_line import parse, parser_of
from data_pipelines.errors import UserError
from pretrain.errors import StoppedError
from pretrain.screen import forget_unsaid
from pretrain.stopping import Interrupted

_EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"  # set by the launcher, to which torchrun would say 1 whatever happened


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `run` does what the command is for."""
    return parser_of("pretrain", "Trains and evaluates vision-language models.")


def main() -> None:
    options = parse(parser(), sys.argv[1:])
    try:
        options.run(options)
    except UserError as error:
        _leave(error)
    except Interrupted:
        _leave(StoppedError("Told to stop before the first step: there is nothing to save. Start again when you like."))
    except Exception:
        # A rank that loses its connection to one that ended with a sentence of its own has nothing to add.
        if (code := _exit_code_of_another_rank()) is None:
            raise
        sys.exit(code)
    finally:
        forget_unsaid()


def _leave(error: UserError) -> None:
    """Prints one sentence, once, and ends: other ranks may wait for this one in a collective."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on a launcher may end it
    if path := os.environ.get(_EXIT_CODE_FILE):
        Path(path).write_text(str(error.exit_code))
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(2)  # the main rank goes first, if it met an error too
    if _first_to_speak(path):
        with suppress(OSError):
            print(error, file=sys.stderr, flush=True)
    # Exit handlers end the data workers. A communication library that hangs in its own is not waited for.
    faulthandler.dump_traceback_later(20, exit=True)
    sys.exit(error.exit_code)


def _first_to_speak(path: str | None) -> bool:
    try:
        if path:
            Path(f"{path}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _exit_code_of_another_rank() -> int | None:
    path = os.environ.get(_EXIT_CODE_FILE)
    for _ in range(30 if path else 0):
        if path and Path(path).exists() and (text := Path(path).read_text()):
            return int(text)
        time.sleep(0.1)
    return None


if __name__ == "__main__":
    main()
