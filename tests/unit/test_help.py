"""What `--help` says: defaults that say something, and examples that are right."""

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from data_pipelines import __main__ as data_pipelines
from launch import __main__ as launch
from pretrain import __main__ as pretrain

PARSERS = {"data_pipelines": data_pipelines.parser, "launch": launch.parser, "pretrain": pretrain.parser}


def commands() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for module, parser in PARSERS.items():
        for action in parser()._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, command in action.choices.items():
                    yield module, name, command


@pytest.mark.parametrize(("module", "name", "command"), [pytest.param(*c, id=f"{c[0]} {c[1]}") for c in commands()])
def test_a_commands_help_shows_no_empty_default_and_examples_that_can_be_typed(module, name, command):
    text = command.format_help()
    assert not re.search(r"\(default:\s+(None|False|\[\]|0|0\.0)\)", text)
    assert command.description or command.epilog
    lines = text.partition("examples:\n")[2].splitlines()
    assert lines
    ours = []
    for line in lines:
        words = shlex.split(line)
        module_at = words.index("-m") + 1
        _, late = PARSERS[words[module_at]]().parse_known_args(words[module_at + 1 :])
        assert not [word for word in late if word.startswith("-")]
        ours.append(words[module_at : module_at + 2] == [module, name] or "doctor" in line or "launch local" in line)
    assert all(ours)


def test_a_default_that_says_something_is_shown():
    texts = {(module, name): " ".join(command.format_help().split()) for module, name, command in commands()}
    assert "(default: h100)" in texts["launch", "plan"]
    assert "(default: heldout)" in texts["pretrain", "evaluate"]
    assert "(default: 10000)" in texts["data_pipelines", "pack"]


@pytest.mark.parametrize("word", ["--training.steps=5", "--data.cache.folder=/x"])
def test_an_override_with_dashes_is_told_how_to_be_written(capsys, word):
    with pytest.raises(SystemExit) as ended:
        launch.main(["local", "x.yaml", word])
    assert ended.value.code == 2
    assert f"{word} is an override, which has no dashes: write {word[2:]}" in capsys.readouterr().err
