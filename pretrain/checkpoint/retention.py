"""Which checkpoints stay on disk."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """What stays whatever comes after it: the newest, those of every n-th step, the best, and pinned ones."""

    newest: int = 3
    every: int | None = None  # steps

    def superfluous(self, steps: Sequence[int], best: int | None, pinned: Collection[int]) -> list[int]:
        """Those of the ascending steps that may go."""
        kept = {*steps[-self.newest :], best, *pinned}
        return [step for step in steps if step not in kept and not (self.every and step % self.every == 0)]
