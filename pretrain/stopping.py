"""Signals that tell a run to stop: heard at any time, heeded where nothing is lost by it.

SIGTERM and SIGUSR1, which launchers and Slurm send, and Ctrl-C (SIGINT). Slurm sends its signals two or three times,
and so does a launcher that passes them on; a repeated one therefore changes nothing, except a SIGINT that comes
REPEAT_S or more after the first request: that is a person, and the process ends at once.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

REPEAT_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """Told to stop where nothing has to be finished. Not an Exception: nobody on the way may take it for a fault."""


class Stop:
    """Whether this process was told to stop. Listens from the moment it is made.

    A signal that was ignored when the run started, as a shell ignores Ctrl-C for its background jobs, stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = False
        self._first_s: float | None = None
        self._pressed = False  # Ctrl-C
        self._parent = os.getppid()
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, being told to stop raises `Interrupted` at once: a start, or a wait for data that may never come."""
        self._interrupts = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _hear(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first_s is not None and now - self._first_s >= REPEAT_S:
            # A launcher that a second Ctrl-C has ended passes that on by its death, as SIGTERM (parallel/mesh.py).
            launcher_left = self._pressed and os.getppid() != self._parent
            if number == signal.SIGINT or launcher_left:
                print("Told again to stop: leaving at once; the newest checkpoint stays.", file=sys.stderr, flush=True)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
        self._first_s = self._first_s or now
        self._pressed |= number == signal.SIGINT
        self.requested = True
        if self._interrupts:
            self._interrupts = False  # once: a second signal must not disturb the way out
            raise Interrupted
