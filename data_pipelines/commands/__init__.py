"""The commands of `python -m data_pipelines`, a file each; `command_line.py` says what such a file has."""

COMMANDS = ("demo", "pack", "index", "verify", "stats", "inspect", "reshard", "tokenizer", "adopt", "coverage")
