"""What is wrong with a config, one sentence a problem: where, which key, the value, the fix."""

import difflib
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.config_text.kinds import Location, is_block, keys_of, kinds_below, kinds_of
from pretrain.config_text.tree import COMMAND_LINE, Tree
from pretrain.config_text.words import Unreadable


def sentences(error: ValidationError, schema: type[BaseModel], tree: Tree) -> list[str]:
    """Every problem once, with the place where it was written."""
    found: dict[Location, str] = {}
    problems = [(_location(problem["loc"], schema), problem) for problem in error.errors(include_url=False)]
    inside = {location[:depth] for location, _ in problems for depth in range(len(location))}
    for location, problem in problems:
        if problem["type"].endswith("_type") and isinstance(problem["input"], dict) and location in inside:
            continue  # a block where a path or a number would do as well, and the problem is in the block
        if location not in found or location == ():
            said = _with_defaults(_explain(location, problem, schema), schema, tree)
            found[(*location, *([said] if location == () else []))] = f"{_place(location, said, tree)}: {said}"
    return list(found.values())


def _location(raw: tuple[int | str, ...], schema: type[BaseModel]) -> Location:
    """The key, without what pydantic adds: the alternative of a union that it tried, and `[key]`."""
    location, kinds, inside_union = [], [schema], False
    for name in raw:
        if name == "[key]":
            continue
        if not inside_union and sum(kind is not type(None) for kind in kinds) > 1:
            inside_union = True
            continue
        location.append(name)
        kinds, inside_union = kinds_below(kinds, name), False
    return tuple(location)


def _explain(location: Location, problem: Any, schema: type[BaseModel]) -> str:
    key, value = ".".join(map(str, location)), problem["input"]
    said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    if problem["loc"][-1:] == ("[key]",):
        return f"{'.'.join(map(str, location[:-1]))} has the key {value!r}: {said}."
    match problem["type"]:
        case "extra_forbidden":
            known = keys_of(reduce(kinds_below, location[:-1], [schema]))
            name = str(location[-1])
            if "." in name and name.split(".")[0] in known:
                return f"unknown key {key}: in a file write {name.split('.')[0]}, a colon, and the rest indented below."
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys there are {', '.join(known)}."
            return f"unknown key {key}: {hint}"
        case "missing" if isinstance(location[-1], int):
            return f"{'.'.join(map(str, location[:-1]))} has too few values: it takes at least {location[-1] + 1}."
        case "missing":
            return f"{key} is missing: add it to the file, or {key}=... to the command."
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{message}." if not key or key in message else f"{key}: {message}."
        case _:
            if isinstance(value, Unreadable) and value.fix:
                said = value.fix
            elif value is None:
                return f"{key} is null, and cannot be: {said}."
            return f"{key} is {value!r}: {said}."


def _place(location: Location, said: str, tree: Tree) -> str:
    """Where a problem comes from. One between several keys comes from the command line if one of them does."""
    for written, place in tree.places.items():
        above = location[: len(written)] == written
        below = written[: len(location)] == location and str(written[-1]) in said
        if place == COMMAND_LINE and (above or below):
            return COMMAND_LINE
    around = (location[:depth] for depth in range(len(location), 0, -1))
    return next((tree.places[key] for key in around if key in tree.places), tree.source)


def _with_defaults(said: str, schema: type[BaseModel], tree: Tree) -> str:
    """Says of a value that nobody wrote that it is the default."""
    for location, default in _defaults(schema):
        given = f"{'.'.join(map(str, location))} {default}"
        if given in said and not _is_written(location, tree):
            said = re.sub(rf"(?<![\w.]){re.escape(given)}(?![\w.]*\w)", f"{given} (the default)", said, count=1)
    return said


def _defaults(schema: type[BaseModel], above: Location = ()) -> Iterator[tuple[Location, Any]]:
    for name, field in schema.model_fields.items():
        blocks = [kind for kind in kinds_of(field.annotation) if is_block(kind)]
        for block in blocks:
            yield from _defaults(block, (*above, name))
        if not blocks and field.default is not None and not field.is_required():
            yield (*above, name), field.default


def _is_written(location: Location, tree: Tree) -> bool:
    node: Any = tree.values
    for name in location:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True
