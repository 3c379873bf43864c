"""The options that several commands have."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

SOURCES = "manifest.json, or shards as `index` takes them: files, folders, globs, braces, URLs"


def add_sources(parser: ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help=SOURCES)


def add_processes(parser: ArgumentParser) -> None:
    parser.add_argument("--processes", type=at_least(1), help="working at the same time; by default one per core")


def add_part(parser: ArgumentParser) -> None:
    share = "do this share only, from 0/COUNT on, as in --shard $SLURM_ARRAY_TASK_ID/8"
    parser.add_argument("--shard", metavar="NUMBER/COUNT", help=share)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"give a whole number of {least} or more, not {text}")
        return int(text)

    return number
