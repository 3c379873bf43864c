"""Whether the steps of a run are sound: those that changed no weight are counted, and losses that jump are noticed."""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from pretrain.config import TrainingConfig
from pretrain.errors import TrainingError

SKIPPED_WINDOW = 100  # steps
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves would make a spike of every digit


class Verdict(NamedTuple):
    """On one step."""

    said: str | None = None
    """What there is to say."""
    go_back: str | None = None
    """Why the run has to go back to a checkpoint, if it has to."""


class Health:
    """The last losses, and the steps that were skipped. Equal on all ranks, and saved with a run.

    A spike is judged by the median and the median absolute deviation, which a few spikes among the last losses hardly
    move; a loss that stays high becomes the new normal once it fills half of the window.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.skipped_steps = 0  # in the whole run
        self.skipped_lately: list[int] = []  # those of the last SKIPPED_WINDOW steps
        self._spiking = False

    def limit(self) -> float:
        """The next loss is a spike if it is above; infinite while the window is not full."""
        if len(self.losses) < self.config.spike_window:
            return math.inf
        median = statistics.median(self.losses)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.config.spike_threshold * max(deviation, LEAST_DEVIATION * abs(median))

    def judge(self, step: int, loss: float, applied: bool) -> Verdict:
        """Takes note of a step that was taken, or was skipped.

        Raises:
            TrainingError: too many were skipped.
        """
        limit, policy, was_spiking = self.limit(), self.config.spikes, self._spiking
        self._spiking = loss > limit
        if math.isfinite(loss):
            self.losses.append(loss)
        spike = f"the loss jumped to {loss:.4g}, above {limit:.4g}" if self._spiking else None
        if not applied:
            self.skipped_steps += 1
            self.skipped_lately = [s for s in self.skipped_lately if s > step - SKIPPED_WINDOW] + [step]
            if self.skips_too_many and policy != "rollback":
                raise self.too_many_skipped()
            why = (policy == "skip" and spike) or "the loss or the gradient norm is not finite"
            said = f"skipped: {why} ({self._skipped()}, {self.skipped_steps} in all)"
            return Verdict(said, f"{self._skipped()} were skipped" if self.skips_too_many else None)
        if spike and policy == "rollback":
            return Verdict(go_back=spike)
        return Verdict(f"{spike}; training.spikes says what can follow." if spike and not was_spiking else None)

    @property
    def skips_too_many(self) -> bool:
        """Whether the last steps changed no weight too often to go on."""
        return len(self.skipped_lately) >= self.config.max_skipped_steps

    def too_many_skipped(self) -> TrainingError:
        """What ends a run whose steps change no weight."""
        return TrainingError(
            f"{self._skipped()}, up to step {self.skipped_lately[-1]}, were skipped, and training.max_skipped_steps is "
            f"{self.config.max_skipped_steps}: lower optimizer.learning_rate, and start again to go on from the newest "
            f"checkpoint."
        )

    def _skipped(self) -> str:
        return f"{len(self.skipped_lately)} of the last {SKIPPED_WINDOW} steps"

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"losses": list(self.losses), "skipped": self.skipped_steps, "skipped_lately": self.skipped_lately}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up `state`, maybe of a run with another window."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.skipped_steps, self.skipped_lately = state["skipped"], list(state["skipped_lately"])
