"""Which values a key of a schema takes: the alternatives of its type, and of what lies under it."""

from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

Location = tuple[int | str, ...]
"""A key, as the names on the way to it; a number is a place in a list."""


def kinds_of(annotation: Any) -> list[Any]:
    """The alternatives of a type: of `Path | dict[str, float] | None` all three."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for option in get_args(annotation) for kind in kinds_of(option)]
    return [annotation]


def kinds_below(kinds: Iterable[Any], key: int | str) -> list[Any]:
    """The alternatives of what stands under a key, or at a place of a list; none where there is no such key."""
    found: list[Any] = []
    for kind in kinds:
        if is_block(kind) and key in kind.model_fields:
            found += kinds_of(kind.model_fields[key].annotation)
        elif is_dict(kind):
            found += kinds_of(get_args(kind)[1])
        elif is_list(kind) and isinstance(key, int):
            places = [place for place in get_args(kind) if place is not ...]
            found += kinds_of(places[min(key, len(places) - 1)])
    return found


def kinds_of_keys(kinds: Iterable[Any]) -> list[Any]:
    """The alternatives of the keys themselves: words, but for a dict that says otherwise."""
    return [option for kind in kinds if is_dict(kind) for option in kinds_of(get_args(kind)[0])] or [str]


def keys_of(kinds: Iterable[Any]) -> list[str]:
    """The names of the keys that a block has."""
    return [name for kind in kinds if is_block(kind) for name in kind.model_fields]


def is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def is_dict(kind: Any) -> bool:
    return get_origin(kind) is dict


def is_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list)
