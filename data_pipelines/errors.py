"""Errors that are the user's to mend: one clear sentence, no traceback."""


class UserError(Exception):
    """Something outside the code is wrong: the message names it, the values and the fix.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 4


class DataError(UserError):
    """A shard, a sample, a manifest or a tokenizer is not what it should be."""


class SampleError(Exception):
    """One sample cannot be used, for a reason that is a pure function of its bytes.

    Never reaches the user as such: training replaces the sample and counts it, the tools report it.
    """
