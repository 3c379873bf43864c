"""The command line of a package: a file per command in its folder `commands/`, and how `--help` looks."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

EXAMPLES = "examples:\n"


def parser_of(package: str, description: str) -> argparse.ArgumentParser:
    """Parses into a namespace whose `command` is the command's name, and whose `run` does what it is for.

    The table `COMMANDS` of `PACKAGE.commands` lists the names, in the order of the help. The file of a command has a
    docstring, which describes it; `HELP`, a line; `EXAMPLES`, what may follow its name, or whole lines with `-m`;
    `add_arguments(parser)`; and `run(options)`, which returns the exit code if it is not 0. `run` imports what takes
    time to import, so that the help comes at once.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in import_module(f"{package}.commands").COMMANDS:
        command = _load(package, name)
        lines = (line if " -m " in line else f"python -m {package} {name} {line}" for line in command.EXAMPLES)
        added = commands.add_parser(
            name,
            formatter_class=_HelpFormatter,
            help=command.HELP,
            description=command.__doc__,
            epilog=EXAMPLES + "\n".join(f"  {line}" for line in lines),
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """As `parse_args` does; but where a command takes `overrides`, they may also stand behind its options."""
    options, late = parser.parse_known_args(words)
    takes_overrides = hasattr(options, "overrides")
    for word in late:
        if takes_overrides and re.match(r"--[a-z_]+\.", word):
            parser.error(f"{word} is an override, which has no dashes: write {word.lstrip('-')}")
        if not takes_overrides or word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}")
    if late:
        options.overrides += late
    return options


def _load(package: str, name: str) -> ModuleType:
    place = f"{package}/commands"
    if find_spec(f"{package}.commands.{name}") is None:
        sys.exit(f"{place}/__init__.py lists the command {name}, and there is no {place}/{name}.py.")
    command = import_module(f"{package}.commands.{name}")
    for part in ("__doc__", "HELP", "EXAMPLES", "add_arguments", "run"):
        if not getattr(command, part, None):
            sys.exit(f"The command {name} lacks {part}: add it to {place}/{name}.py.")
    return command


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)
