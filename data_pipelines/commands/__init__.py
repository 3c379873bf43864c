"""The commands in the order of the help: a file each, named as the command, whose docstring describes it there.

A file has `HELP`, `EXAMPLES`, `add_arguments` and `run`, which returns the exit code if it is not 0. What takes time to
import is imported within `run`, so that the help comes at once.
"""

COMMANDS = ("demo", "pack", "index", "verify", "stats", "inspect", "reshard", "tokenizer", "adopt", "coverage")
