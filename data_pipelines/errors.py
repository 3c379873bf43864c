"""Errors that are the user's to mend: one clear sentence, no traceback."""


class UserError(Exception):
    """Something outside the code is wrong: the message names it, the values and the fix.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 4


class DataError(UserError):
    """A shard, a sample, a manifest or a tokenizer is not what it should be."""
