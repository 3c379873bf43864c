"""The commands of `python -m launch`, a file each; `data_pipelines/command_line.py` says what such a file has."""

import argparse

COMMANDS = ("local", "slurm", "status", "logs", "cancel", "resume", "plan")


def positive(text: str) -> int:
    """Read a count of processes, machines, GPUs or tokens."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def not_negative(text: str) -> int:
    """Read a count that may be 0."""
    return 0 if text == "0" else positive(text)
