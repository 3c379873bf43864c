"""Errors that are the user's to mend: one clear sentence, no traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data_pipelines.redaction import redacted
from data_pipelines.text import counted

_MOST_NAMED = 20


class UserError(Exception):
    """Something outside the code is wrong: the message names it, the values and the fix.

    The command line prints the message without a traceback and exits with `exit_code`. What is secret in it, such as
    the signature of a URL that a server's client speaks of, is left out.
    """

    exit_code = 4

    def __str__(self) -> str:
        return redacted(super().__str__())


class DataError(UserError):
    """A shard, a sample, a manifest or a tokenizer is not what it should be."""


class MissingError(DataError):
    """A shard is not where it was named."""

    @classmethod
    def of(cls, names: Sequence[str], total: int) -> MissingError:
        """All that are missing of `total`, at once."""
        others = f" and {len(names) - _MOST_NAMED:,} others" if len(names) > _MOST_NAMED else ""
        listed = ", ".join(names[:_MOST_NAMED]) + others
        return cls(
            f"{len(names):,} of {counted(total, 'shard')} cannot be found: {listed}. Put them back, or name the others "
            f"alone."
        )


@contextmanager
def named(key: str) -> Iterator[None]:
    """Says of what is wrong with a file which key of the config gave it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def cannot_open(what: str, error: OSError) -> DataError:
    """What to say of a file that is there and yet cannot be opened."""
    fix = _FIXES.get(error.errno or 0, "see that you may read it and that its disk answers")
    return DataError(f"{what} cannot be opened ({error.strerror}): {fix}.")


def cannot_write(what: str, error: OSError) -> DataError:
    """What to say of a file that cannot be made."""
    fix = _FIXES.get(error.errno or 0, "free some space or get the right to write there")
    return DataError(f"Cannot write {what} ({error.strerror}): {fix}.")


_FIXES = {
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a place in a folder, not below a file",
    errno.EEXIST: "name a place in a folder, not below a file",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the machine's limit of open files (`sysctl fs.file-max`)",
}


class SampleError(Exception):
    """One sample cannot be used, for a reason that is a pure function of its bytes.

    Never reaches the user as such: training replaces the sample and counts it, the tools report it.
    """

    def __init__(self, reason: str, key: str = ""):
        super().__init__(reason)
        self.key = key  # of the sample, where whoever catches this cannot know it
