"""Lines for whoever watches a run, without secrets. A line that cannot be shown is lost; the run goes on."""

import contextlib
import os
import sys

from data_pipelines.redaction import redacted


def say(text: str) -> None:
    """Prints a line at once, in whatever characters the terminal has."""
    # What a full disk does not take stays in the buffer, and comes with a later line once there is room.
    with contextlib.suppress(OSError, ValueError):
        encoding = sys.stdout.encoding or "utf-8"
        print(redacted(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def forget_unsaid() -> None:
    """Ends what is said: of lines that still have no room, Python would make an exit code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
