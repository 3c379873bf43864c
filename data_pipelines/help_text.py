"""How `--help` looks, for every command."""

from __future__ import annotations

import argparse

EXAMPLES = "examples:\n"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


def examples(*commands: str) -> str:
    """The last part of a command's help."""
    return EXAMPLES + "\n".join(f"  {command}" for command in commands)
