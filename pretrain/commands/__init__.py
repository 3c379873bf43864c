"""The commands of `python -m pretrain`, a file each; `data_pipelines/command_line.py` says what such a file has."""

COMMANDS = ("train", "evaluate", "doctor")
