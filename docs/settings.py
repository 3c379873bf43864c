"""Writes docs/settings.md from the models of the config: `make docs`."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.config import Config, parse_config
from pretrain.config_text.kinds import is_block, is_dict, is_list, kinds_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Settings

Every key of a config, as `pretrain/config.py` and `data_pipelines/config.py` define it. `make docs` writes this page
from them, and a test holds it to them. Values are read by the type of their key, in a file and in `key=value` alike: a
path is any text, with `~` and `$VARIABLES` replaced; a number is a decimal number (or 0x1F, 0o17); the only booleans
are `true` and `false`; `null`, `~`, `None` and `none` are null where a key can be null; a list is `[1, 2]` or `1,2`.

Keys without a default have to be given; but sections of `model` and what is in them follow from `model.size` (here
those of base/16) and `model.architecture`, as `pretrain/model_config.py` has them, and an objective that the
architecture can be trained with is on, with its own defaults, unless it is `null`. Words that are not plain are in
the [glossary](glossary.md).
"""
GIVEN = {
    "output": "runs/x",
    "data": {"train": "manifest.json", "tokenizer": "tokenizer.model"},
    "model": {},
    "training": {"steps": 10**6, "global_batch": 1024},
}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_block(Config, parse_config(GIVEN, "docs/settings.py"), GIVEN, ""), ""])


def _block(block: type[BaseModel], values: Any, given: Any, path: str) -> Iterator[str]:
    """The table of a block, then those of the blocks inside it."""
    inner: list[tuple[type[BaseModel], str, Any, Any]] = []
    yield f"## {path.rstrip('.') or 'The run'}\n"
    if block.__doc__:
        yield f"{' '.join(block.__doc__.split())}\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for name, field in block.model_fields.items():
        key, value = f"{path}{name}", getattr(values, name, None)
        below = given.get(name) if isinstance(given, dict) else None
        kinds = kinds_of(field.annotation)
        named = [option for kind in kinds if is_dict(kind) for option in kinds_of(get_args(kind)[1])]
        inner += [(kind, f"{key}.", value, below) for kind in kinds if is_block(kind)]
        inner += [(kind, f"{key}.NAME.", None, None) for kind in named if is_block(kind)]
        cells = (f"`{key}`", _values(kinds, field), _default(field, value, below), field.description or "")
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
    yield ""
    for kind, inside, value, below in inner:
        yield from _block(kind, value, below, inside)


def _values(kinds: list[Any], field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [(sign, getattr(part, name, None)) for part in field.metadata for name, sign in signs.items()]
    bounds = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return ", ".join([" or ".join(map(_kind, kinds)), *bounds])


def _kind(kind: Any) -> str:
    plain = {bool: "true or false", int: "whole number", float: "number", Path: "path", str: "text", NoneType: "null"}
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if is_list(kind):
        parts = [" or ".join(map(_kind, kinds_of(part))) for part in get_args(kind) if part is not ...]
        return f"[{', '.join(parts)}]"
    if is_dict(kind):
        key, value = (" or ".join(map(_kind, kinds_of(part))) for part in get_args(kind))
        return f"{{{key}: {value}, ...}}"
    return "block" if is_block(kind) else plain.get(kind, str(kind))


def _default(field: FieldInfo, value: Any, given: Any) -> str:
    if isinstance(value, BaseModel):
        return "below"
    if field.is_required():
        return "" if given or value is None else f"{value}, by `model.size`"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
