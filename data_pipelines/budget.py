"""How many samples may be bad before a run stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_pipelines.batch import BadSample
from data_pipelines.errors import DataError


class BadSampleBudget:
    """Counts replaced samples, and stops the run when there are more than it may have.

    Args:
        max_bad_samples: Allowed whatever the length of the run.
        max_bad_fraction: Allowed besides, as a share of the samples taken.
    """

    def __init__(self, max_bad_samples: int, max_bad_fraction: float):
        self._max_samples, self._max_fraction = max_bad_samples, max_bad_fraction
        self._last: BadSample | None = None
        self.reasons: Counter[str] = Counter()  # of this rank's samples
        self.num_bad = 0  # over all ranks
        self.num_seen = 0

    def add(self, bad: Sequence[BadSample], num_bad: int, num_seen: int) -> None:
        """Counts one step.

        Args:
            bad: Samples replaced on this rank; may differ from rank to rank.
            num_bad: Samples replaced on all data-parallel ranks together.
            num_seen: Samples of the step on all data-parallel ranks together.

        Raises:
            DataError: The budget is used up; on every rank in the same step, as the sums are equal.
        """
        self.reasons.update(sample.reason for sample in bad)
        self.num_bad += num_bad
        self.num_seen += num_seen
        self._last = bad[-1] if bad else self._last
        if self.num_bad <= self._max_samples + self._max_fraction * self.num_seen:
            return
        here = "none of them on this rank"
        if self._last:
            counts = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
            here = (
                f"on this rank {counts}; the last was {self._last.key} in shard {self._last.shard}: {self._last.reason}"
            )
        raise DataError(
            f"{self.num_bad:,} of {self.num_seen:,} samples had to be replaced ({here}). Mend or leave out "
            f"these shards, or raise data.max_bad_samples ({self._max_samples:,}) "
            f"or data.max_bad_fraction ({self._max_fraction})."
        )
