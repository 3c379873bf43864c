"""Heartbeats: what a rank does and since when, in a small file that the node's launcher watches.

A stopped process cannot watch itself. A rank therefore writes a few bytes of mapped memory whenever its phase changes,
in a folder of its node that the launcher names in PRETRAIN_HEARTBEATS; `launch/watch.py` reads them, and asks for the
stacks of all threads by SIGUSR2. Imports no torch, since both sides read it.
"""

import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

FOLDER = "PRETRAIN_HEARTBEATS"
DUMP_STACKS = signal.SIGUSR2
PHASES = ("start", "data", "agree", "step", "save", "evaluate", "end")  # in their order; agree: waits for the others
_RECORD = struct.Struct("<5qd")
_FIRST = 15  # times the limit, until a phase has been seen: the first steps compile, and fill caches and buffers
_SEEN = 3


class Heartbeat(NamedTuple):
    """One rank's word."""

    beats: int
    pid: int
    phase: int
    step: int
    saved_step: int
    limit_s: float
    """How long this phase may take before the rank counts as hung."""

    @classmethod
    def read(cls, path: Path) -> "Heartbeat | None":
        """What a rank last wrote; None before its first word."""
        try:
            record = cls(*_RECORD.unpack(path.read_bytes()))
        except (OSError, struct.error):
            return None
        return record if record.beats else None

    @property
    def place(self) -> str:
        """Where the rank is, for a person."""
        name = PHASES[self.phase]
        step = self.step + (name in ("data", "agree", "step"))  # of these, the step that they will complete
        return f"the {name}" if name in ("start", "end") else f"{name}, step {step}"


class Heart:
    """This rank's own side.

    The limit of a phase is the largest of `hang_timeout_s` and five times what the phase has taken, as its slowest of
    the last hundred; fifteen times `hang_timeout_s` until it has been seen three times; never more than `most_s`.
    """

    def __init__(self, output: Path, hang_timeout_s: float, most_s: float, patience_s: float = 0.0) -> None:
        """Names itself to the launcher, if there is one.

        Args:
            output: the run's folder.
            hang_timeout_s: how long any phase may take.
            most_s: lies below the process groups' own timeout.
            patience_s: how long data may be tried again.
        """
        self._hang_timeout_s, self._most_s, self._patience_s = hang_timeout_s, most_s, patience_s
        self.saved_step = -1
        self._durations: dict[str, deque[float]] = {phase: deque(maxlen=100) for phase in PHASES}
        self._beats, self._phase, self._since = 0, "", 0.0
        folder, rank = os.environ.get(FOLDER), os.environ.get("RANK", "0")
        if folder and Path(folder).is_dir():
            output_of(Path(folder)).write_text(str(output.absolute()), encoding="utf-8")
            self._stacks = stacks_of(Path(folder), rank).open("w")
            path = heartbeat_of(Path(folder), rank)
            path.write_bytes(bytes(_RECORD.size))
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _RECORD.size)
        else:
            self._stacks = sys.stderr
            self._memory = mmap.mmap(-1, _RECORD.size)
        faulthandler.register(DUMP_STACKS, file=self._stacks, all_threads=True)

    def beat(self, phase: str, step: int) -> None:
        """Says that a phase begins, or has gone on: after a batch of an evaluation, for one."""
        now = time.monotonic()
        if self._phase:
            self._durations[self._phase].append(now - self._since)
        self._phase, self._since, self._beats = phase, now, self._beats + 1
        record = (self._beats, os.getpid(), PHASES.index(phase), step, self.saved_step, self.limit_s(phase))
        self._memory[:] = _RECORD.pack(*record)

    def limit_s(self, phase: str) -> float:
        """How long the phase may take."""
        if len(self._durations[phase]) < _SEEN:
            limit_s = _FIRST * self._hang_timeout_s
        else:
            limit_s = max(self._hang_timeout_s, 5 * max(self._durations[phase]))
        if phase in ("data", "agree"):  # while one rank tries again for its data, the others wait for it
            limit_s += self._patience_s
        return min(limit_s, self._most_s)


def heartbeat_of(folder: Path, rank: int | str) -> Path:
    return folder / f"rank-{rank}.heartbeat"


def stacks_of(folder: Path, rank: int | str) -> Path:
    return folder / f"rank-{rank}.stacks"


def output_of(folder: Path) -> Path:
    """The file that holds the path of the run's folder, where stacks go."""
    return folder / "output"
