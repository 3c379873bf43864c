"""Steps that went wrong, and how many of them a run may have."""

from pretrain.errors import TrainingError


class SkippedSteps:
    """Counts steps that were skipped, and ends a run that does nothing else."""

    def __init__(self, max_in_a_row: int) -> None:
        self.total = 0
        self.in_a_row = 0
        self.max_in_a_row = max_in_a_row

    def watch(self, step: int, applied: bool) -> str | None:
        """What to say of a step that was skipped.

        Raises:
            TrainingError: too many in a row.
        """
        if applied:
            self.in_a_row = 0
            return None
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"The last {self.in_a_row} steps, up to step {step}, had a loss or gradient norm that is not finite, "
                f"and training.max_skipped_steps is {self.max_in_a_row}: lower optimizer.learning_rate, and start "
                f"again with the same command to go on from the newest checkpoint."
            )
        return (
            f"step {step} skipped: the loss or the gradient norm is not finite "
            f"({self.in_a_row} in a row, {self.total} in all)"
        )
