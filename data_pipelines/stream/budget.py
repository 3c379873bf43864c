"""How many samples may be bad before a run stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_pipelines.batch import BadSample
from data_pipelines.errors import DataError
from data_pipelines.shards.tar import printable


class BadSampleBudget:
    """Counts replaced samples, and stops the run when there are more than it may have.

    Args:
        max_bad_samples: Allowed whatever the length of the run.
        max_bad_fraction: Allowed besides, as a share of the samples taken.
    """

    def __init__(self, max_bad_samples: int, max_bad_fraction: float):
        self._max_samples, self._max_fraction = max_bad_samples, max_bad_fraction
        self.reasons: Counter[str] = Counter()  # of the samples added here; after a resume, num_bad has more
        self.num_bad = 0
        self.num_seen = 0

    def add(self, bad: Sequence[BadSample], num_seen: int) -> None:
        """Counts one step.

        Args:
            bad: Samples replaced on all data-parallel ranks.
            num_seen: Samples of the step on all of them.

        Raises:
            DataError: The budget is used up; on every rank in the same step, as the counts are equal.
        """
        self.reasons.update(sample.reason for sample in bad)
        self.num_bad += len(bad)
        self.num_seen += num_seen
        if not bad or self.num_bad <= self._max_samples + self._max_fraction * self.num_seen:
            return
        last = f"{printable(bad[-1].key)} in shard {bad[-1].shard}: {bad[-1].reason}"
        counts = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
        raise DataError(
            f"{self.num_bad:,} of {self.num_seen:,} samples had to be replaced (since the start or resume: {counts}; "
            f"the last was {last}). Mend or leave out these shards, "
            f"or raise data.max_bad_samples ({self._max_samples:,}) or data.max_bad_fraction ({self._max_fraction})."
        )
