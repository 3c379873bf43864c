"""What can end a run, each with the exit code that a batch script reads."""

from data_pipelines.errors import UserError


class ConfigError(UserError):
    """A key, a value or a combination in the config cannot work (exit code 4)."""


class CheckpointError(UserError):
    """No valid checkpoint where one is needed, or one of another run (exit code 3)."""

    exit_code = 3


class TrainingError(UserError):
    """Training itself went wrong: too many steps in a row were not finite (exit code 5)."""

    exit_code = 5


class StorageError(UserError):
    """The run's folder is in use, or checkpoints can no longer be written to it (exit code 4)."""


class LayoutError(UserError):
    """A layout does not take the steps that one process takes (exit code 7)."""

    exit_code = 7


class FencedError(UserError):
    """Another job owns the run's folder now, and this one may change nothing in it (exit code 8)."""

    exit_code = 8


class StoppedError(UserError):
    """Told to stop, and saved what there was: the same command goes on from there (exit code 85)."""

    exit_code = 85
