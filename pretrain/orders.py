"""What a run is told from outside, asked for at each step border.

Signals reach any rank. The main rank also looks for two files in the run's folder, STOP and SAVE, and at the clock,
where the job's end is known.
"""

import time
from collections import deque
from pathlib import Path

from pretrain.screen import say
from pretrain.stopping import Stop

_LOOK_S = 1.0  # between two looks at the files: they lie on a file system that others use too
_UNMEASURED_SAVE_S = 60.0
_RESERVE_S = 30.0  # for leaving, beyond saving


class Orders:
    """Answers for this rank; the trainer adds up what the ranks say."""

    def __init__(self, stop: Stop, folder: Path | None = None, limit: tuple[float, float] | None = None) -> None:
        """`folder` and `limit`, the job's beginning and end, are the main rank's alone."""
        self.stop, self._folder, self._limit = stop, folder, limit
        self.reason = "Told to stop"
        self._looked = self._last_border = time.monotonic()
        self._step_s: deque[float] = deque(maxlen=100)
        self._save_s = _UNMEASURED_SAVE_S
        self._saves_measured = 0
        self._unremovable: set[Path] = set()

    def pending(self) -> tuple[int, int]:
        """(1 if told to save, 1 if told to save and leave); call it once per step."""
        now = time.monotonic()
        self._step_s.append(now - self._last_border)
        self._last_border = now
        save = leave = False
        if self._folder is not None and now - self._looked >= _LOOK_S:
            self._looked = now
            save = self._found(self._folder / "SAVE")
            if self._found(self._folder / "STOP"):
                leave, self.reason = True, f"Told to stop by the file {self._folder / 'STOP'}"
        if self._limit and time.time() >= self._limit[1] - self.margin_s():
            leave = True
            self.reason = f"The job's time ends at {time.strftime('%F %T', time.localtime(self._limit[1]))}"
        return int(save), int(leave or self.stop.requested)

    def saved(self, took_s: float) -> None:
        """Says how long a save has taken."""
        self._save_s = took_s if not self._saves_measured else max(self._save_s, took_s)
        self._saves_measured += 1

    def margin_s(self) -> float:
        """How long before the end to save: for two steps, two saves and a reserve; at most half of the whole time."""
        assert self._limit is not None
        started, end = self._limit
        return min(2 * max(self._step_s) + 2 * self._save_s + _RESERVE_S, (end - started) / 2)

    def _found(self, path: Path) -> bool:
        """Whether the file is there; it is removed, since it is heeded."""
        if path in self._unremovable:
            return False
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            say(f"{path} is heeded once, since it cannot be removed ({error.strerror}).")
            self._unremovable.add(path)
        return True
