"""SIGTERM, which launchers and Slurm send, and Ctrl-C: heard at any time, heeded where nothing is lost by it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Told to stop where nothing has to be finished. Not an Exception: nobody on the way may take it for a fault."""


class Stop:
    """Whether this process was told to stop. Listens from the moment it is made.

    A signal that was ignored when the run started, as a shell ignores Ctrl-C for its background jobs, stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = False
        for number in (signal.SIGTERM, signal.SIGINT):
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
        self.requested = True
        if self._interrupts:
            self._interrupts = False  # once: a second signal must not disturb the way out
            raise Interrupted
