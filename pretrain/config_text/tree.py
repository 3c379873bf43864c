"""A YAML file and the `key=value` laid over it, as a tree of values, and where each of them is written."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pretrain.config_text.kinds import Location, is_block, is_dict, is_list, kinds_below, kinds_of_keys
from pretrain.config_text.words import Unreadable, read_word
from pretrain.errors import ConfigError

COMMAND_LINE = "on the command line"


@dataclass
class Tree:
    """A config before it is checked."""

    source: str
    values: dict[Any, Any]
    places: dict[Location, str] = field(default_factory=dict)
    """File and line of each key, or the command line."""


def read_tree(path: Path, schema: type[BaseModel]) -> Tree:
    """Reads a YAML file, its values by the types of the schema.

    Raises:
        ConfigError: it cannot be read, is no YAML, or has a key twice.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"Cannot read the config {path}: it is no UTF-8 text.") from None
    except FileNotFoundError:
        raise ConfigError(f"No config at {path}: give the path of a YAML file{_recipe(path.name)}.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror}.") from None
    root = _compose(text, f"Cannot read the config {path}")
    places: dict[Location, str] = {}
    values = _Reader(text, places, str(path)).value(root, [schema], ())
    if not isinstance(values, dict):
        raise ConfigError(f"The config {path} is not a mapping of keys to values{_recipe('demo.yaml')}.")
    return Tree(str(path), values, places)


def _recipe(name: str) -> str:
    """Where a recipe is, or the others: beside the packages in a clone, else where they were installed."""
    folder = Path(__file__).parents[2] / "configs"
    if not folder.is_dir():
        with contextlib.suppress(metadata.PackageNotFoundError):
            files = metadata.files("vlm-pretraining-toolkit") or []
            recipes = (Path(str(file.locate())).resolve() for file in files if file.match("configs/*.yaml"))
            folder = next((recipe.parent for recipe in recipes), folder)
    if not folder.is_dir():
        return ""
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return (
        f"; the recipe {name} is {folder / name}" if (folder / name).is_file() else f"; there are recipes in {folder}"
    )


def lay_over(tree: Tree, override: str, schema: type[BaseModel]) -> None:
    """Lays one `key.path=value` over the tree.

    Raises:
        ConfigError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    location: Location = tuple(key.strip().split("."))
    if not equals or not all(location):
        raise ConfigError(f"Cannot read the override {override!r}: write key=value, such as training.steps=100.")
    node: dict[Any, Any] = tree.values
    kinds: list[Any] = [schema]
    for depth, parent in enumerate(location[:-1], start=1):
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
            tree.places[location[:depth]] = COMMAND_LINE
        node, kinds = node[parent], kinds_below(kinds, parent)
    kinds = kinds_below(kinds, location[-1])
    for place in [place for place in tree.places if place[: len(location)] == location]:
        del tree.places[place]
    tree.places[location] = COMMAND_LINE
    node[location[-1]] = _read_argument(override, text, kinds, location, tree.places)


def _read_argument(override: str, text: str, kinds: list[Any], location: Location, places: dict[Location, str]) -> Any:
    """The value of an override: YAML in brackets, braces or quotes, where its key takes that, else one word."""
    brackets = any(is_list(kind) for kind in kinds) and text.startswith("[")
    braces = any(is_block(kind) or is_dict(kind) for kind in kinds) and text.startswith("{")
    if brackets or braces or re.fullmatch(r"""("[^"]*"|'[^']*')""", text):
        root = _compose(text, f"Cannot read the value of {override}")
        return _Reader(text, places, COMMAND_LINE).value(root, kinds, location)
    return read_word(text, kinds, quoted=not text)  # nothing is not null


class _Loader(yaml.SafeLoader):
    """Takes every plain word as text: what it means depends on its key."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _compose(text: str, complaint: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{complaint}: {_said(error)}.") from None
    except RecursionError:
        raise ConfigError(f"{complaint}: it is nested too deeply.") from None


def _said(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    hint = "; indent with spaces" if "\\t" in str(error.problem) else ""
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}{hint}"


_TAGS = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}


class _Reader:
    """Turns the nodes of one text into values, as deep as the schema goes, and notes their places."""

    def __init__(self, text: str, places: dict[Location, str], source: str):
        self._text, self._places, self._source = text, places, source

    def value(self, node: yaml.Node | None, kinds: Sequence[Any], location: Location) -> Any:
        if node is None:
            return Unreadable("")
        if kinds and node.tag != f"tag:yaml.org,2002:{_TAGS[type(node)]}":
            return Unreadable(self._source_of(node), "remove the tag, the word that begins with an exclamation mark")
        if isinstance(node, yaml.ScalarNode):
            word = node.value.strip() if node.style in ("|", ">") else node.value
            return read_word(word, kinds, quoted=bool(node.style))
        if isinstance(node, yaml.MappingNode) and any(is_block(kind) or is_dict(kind) for kind in kinds):
            return self._block(node, kinds, location)
        if isinstance(node, yaml.SequenceNode) and any(is_list(kind) for kind in kinds):
            return [self.value(item, kinds_below(kinds, n), (*location, n)) for n, item in enumerate(node.value)]
        return Unreadable(self._source_of(node))

    def _block(self, node: yaml.MappingNode, kinds: Sequence[Any], location: Location) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        values: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value == "<<" and not key_node.style:  # of YAML 1.1, and in use
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    block = self.value(part, kinds, location)
                    merged = (block if isinstance(block, dict) else {"<<": block}) | merged
                continue
            key = self._key(key_node, kinds)
            if key in lines:
                name = ".".join(map(str, (*location, key)))
                both = f", in line {lines[key]} and in line {line}" if self._source != COMMAND_LINE else ""
                raise ConfigError(f"{self._source}: {name} is written twice{both}: remove one of the two.")
            lines[key] = line
            self._places[(*location, key)] = self._place(key_node)
            values[key] = self.value(value_node, kinds_below(kinds, key), (*location, key))
        return merged | values

    def _key(self, node: yaml.Node, kinds: Sequence[Any]) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self._source_of(node)
        key = read_word(node.value, kinds_of_keys(kinds), quoted=True)
        return key.text if isinstance(key, Unreadable) else key

    def _place(self, node: yaml.Node) -> str:
        return self._source if self._source == COMMAND_LINE else f"{self._source}:{node.start_mark.line + 1}"

    def _source_of(self, node: yaml.Node) -> str:
        return self._text[node.start_mark.index : node.end_mark.index].strip()
