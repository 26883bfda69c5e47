"""What a command's dataclasses declare: the names of its settings, their types, and which values these take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

POSITIONAL = get_args(Positional[int])[1]
"""What marks a field that its place tells."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


Given = frozenset[tuple[str, ...]]
"""The paths of settings that flags or --config set, be it to their defaults; `parse` notes them on a command."""


class Misfit(Exception):
    """A value is not of the declared type."""


def settings(owner: type) -> dict[tuple[str, ...], Any]:
    """Path of each setting -> its declared type: ("out",), and of nested dataclasses ("lora", "rank")."""
    found: dict[tuple[str, ...], Any] = {}
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= {(field.name, *path): inner for path, inner in settings(hint).items()}  # type: ignore[arg-type]
        else:
            found[field.name,] = hint
    return found


def positionals(owner: type) -> list[tuple[str, ...]]:
    """The paths of the settings that have no flag, since their place tells them."""
    hints = get_type_hints(owner, include_extras=True)
    return [(name,) for name, hint in hints.items() if POSITIONAL in getattr(hint, "__metadata__", ())]


def options(hint: Any) -> tuple[Any, ...]:
    """The types that `hint` allows one of, without None."""
    union = get_origin(hint) in (Union, UnionType)
    return tuple(option for option in get_args(hint) if option is not NoneType) if union else (hint,)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one that may be None; () for other types."""
    (only, *more) = options(hint)
    return get_args(only) if get_origin(only) is Literal and not more else ()


def describe(hint: Any) -> str:
    """What values `hint` takes, in words."""
    return " or ".join(map(_describe, options(hint)))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (tuple, list):
        return f"a list of {describe(get_args(hint)[0]).removeprefix('a ')}s"
    if get_origin(hint) in (dict, Mapping):
        return f"a table of {describe(get_args(hint)[1]).removeprefix('a ')}s by name"
    return KINDS.get(hint, str(hint))


def convert(value: Any, hint: Any) -> Any:
    """A value as TOML gives it -> as `hint` declares it. Raises Misfit where it is of another type."""
    for option in options(hint):
        try:
            return _convert(value, option)
        except Misfit:
            continue
    raise Misfit


def _convert(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
        return value
    if origin in (tuple, list) and not isinstance(value, dict):     # a value alone is a list of one, as behind a flag
        return origin(convert(each, inner[0]) for each in (value if isinstance(value, list) else [value]))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: convert(each, inner[1]) for key, each in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise Misfit
