"""When a run saves, what it says of it, and when it gives up."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.retention import add_score
from pretrain.checkpoint.store import CheckpointStore, Failed, Saved
from pretrain.config import CheckpointConfig
from pretrain.errors import StorageError
from pretrain.journal import Journal
from pretrain.parallel.engine import Fragment
from pretrain.screen import say

MAX_FAILED_SAVES = 3  # in a row; then the run stops rather than work for nothing
_COPY_S = 20.0  # for which a run that was told to stop waits for its last copy: schedulers give some 30


class Saving:
    """One save at a time, written while training goes on. All ranks call each method together, but for `is_time`."""

    def __init__(
        self,
        config: CheckpointConfig,
        store: CheckpointStore,
        journal: Journal,
        on_saved: Callable[[int, float], None],
    ) -> None:
        """`on_saved` is told the step of each checkpoint, and how many seconds it took from its beginning."""
        self.config = config
        self.store = store
        self.on_saved = on_saved
        self.journal = journal
        self.mirror = Mirror(config.mirror, store) if config.mirror else None
        self.saved_step: int | None = None  # of the newest checkpoint
        self.failures = 0  # in a row
        self._begun = time.monotonic()
        self._stall_s = 0.0  # of the save in flight

    def fetch(self) -> None:
        """Brings the newest copy of a checkpoint if the folder has none; see `Mirror.fetch`."""
        if self.mirror:
            self.mirror.fetch(may_resume=self.config.resume != "never")

    def note_newest(self, step: int) -> None:
        """The newest checkpoint is that of a step, and is copied if it is not yet."""
        self.saved_step = step
        if self.mirror:
            self.mirror.copy(step)

    def finish(self, beat: Callable[[], None] = lambda: None) -> None:
        """Waits for the last copy, however long that takes; `beat` is called meanwhile."""
        if self.mirror:
            self.mirror.finish(beat=beat)

    def is_time(self) -> bool:
        """Whether `every_minutes` have passed on the main process, whose clock is the run's."""
        minutes = self.config.every_minutes
        return self.store.is_main and minutes is not None and time.monotonic() - self._begun >= 60 * minutes

    def save(self, step: int, fragments: Iterable[Fragment], run: dict[str, Any], must: bool) -> None:
        """Begins to save, once the save before is done; waits for it if it `must` succeed.

        Raises:
            StorageError: this save must succeed and did not, or several in a row did not.
        """
        self.settle(wait=True)
        if self.saved_step != step:
            self._begun = time.monotonic()
            self.journal.flush()
            begin = time.perf_counter()
            self.store.save(step, fragments, run)
            self._stall_s = time.perf_counter() - begin
            if must or not self.config.asynchronous:
                self.settle(wait=True, must=must)
        if must and self.mirror:
            self.mirror.finish(_COPY_S)

    def settle(self, wait: bool = False, must: bool = False) -> None:
        """Says what became of the save in flight, if that is known by now.

        Raises:
            StorageError: it `must` succeed and did not, or several in a row did not.
        """
        begin = time.perf_counter()
        outcome = self.store.settle(wait)
        self._stall_s += time.perf_counter() - begin
        match outcome:
            case Saved(step, write_s):
                self.failures = 0
                self.note_newest(step)
                self.on_saved(step, time.monotonic() - self._begun)
                self.journal.say(f"Saved step {step} in {self.store.folder}.")
                self.journal.checkpoint({"stall_s": self._stall_s, "write_s": write_s})
            case Failed(step, problem):
                self.failures += 1
                self.journal.say(f"Could not save step {step}: {problem}. Earlier checkpoints are untouched.")
                if must or self.failures >= MAX_FAILED_SAVES:
                    raise StorageError(
                        f"Step {step} could not be saved in {self.store.folder} ({problem}): make space or mend the "
                        f"disk, and start again with the same command to go on from the newest checkpoint."
                    )

    def rate(self, step: int, values: Mapping[str, float]) -> None:
        """Notes what held-out data said after a step, so that the best checkpoint stays."""
        if (best := self.config.best) and best in values and self.store.still_owner() is None:
            try:
                add_score(self.store.folder, best, step, values[best])
            except OSError as error:
                say(f"The score of step {step} cannot be kept in {self.store.folder} ({error}); training goes on.")
