"""What arguments and settings may be: their names, types and ranges. Each refusal is one InputError with the value."""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from minitune.errors import InputError
from minitune.names import unknown_names

MAX_WHOLE = 2**31 - 1
"""The largest whole number that a setting takes, seeds apart: lengths and offsets of a batch are int32."""

LONGEST_NAME = 255
"""Bytes of a file's name, on all usual file systems."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2


def answers_names(function: Callable[P, R]) -> Callable[P, R]:
    """Of a function: InputError for an argument that it has not, with ours, where Python would raise a TypeError."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*values: P.args, **named: P.kwargs) -> R:
        unknown = set(named).difference(known)
        if unknown:
            raise InputError(f"{function.__name__}: no argument is named {unknown_names(unknown, known)}; there are "
                             f"{', '.join(known)}")
        return function(*values, **named)

    return checked


def short(value: object) -> str:
    """`value` as one short line for a message, however large or deeply nested it is."""
    return " ".join(map(str.strip, _SHORT.repr(value).splitlines()))


def warn(text: str) -> None:
    """A UserWarning that shows the line from which minitune was called, however deep it is in it."""
    here, ours = os.path.dirname(__file__) + os.sep, 0
    for level, (frame, _) in enumerate(traceback.walk_stack(sys._getframe(1)), 1):
        if frame.f_code.co_filename.startswith(here):
            ours = level
    warnings.warn(text, stacklevel=ours + 2)


def check_names(owner: str, names: Iterable[str], settings: type[Any], more: str = "") -> None:
    """InputError for names that are no fields of the dataclass `settings`; `more` ends it."""
    known = [each.name for each in fields(settings)]
    unknown = set(names).difference(known)
    if unknown:
        raise InputError(f"{owner}: no setting is named {unknown_names(unknown, known)}; there are "
                         f"{', '.join(known)}{more}")


def names_checked(owner: str) -> Callable[[type[T]], type[T]]:
    """Of a dataclass: `check_names` for its keyword arguments, where Python would raise a TypeError."""

    def checked(settings: type[T]) -> type[T]:
        made: Any = settings
        plain = made.__init__

        @functools.wraps(plain)
        def init(self: T, *values: Any, **named: Any) -> None:
            check_names(owner, named, settings)
            plain(self, *values, **named)

        made.__init__ = init
        return settings

    return checked


def check_whole(owner: str, name: str, value: object, low: int = 1) -> None:
    """InputError unless `value` is a whole number from `low` to MAX_WHOLE. True is none."""
    if type(value) is not int or not low <= value <= MAX_WHOLE:
        raise InputError(f"{owner}: {name} is {short(value)}; it must be a whole number from {low} to {MAX_WHOLE}")


def check_share_or_number(owner: str, name: str, value: float, of: str) -> None:
    """InputError unless `value` is a share, below 1, or a whole number of what it is `of`."""
    if value >= 1 and value != int(value):
        raise InputError(f"{owner}: {name} is {value!r}; below 1 it is a share of the {of}, else a whole number of "
                         "them")


def check_path(owner: str, name: str, path: str | os.PathLike[str]) -> Path:
    """The path; InputError for one that no system takes, which is a text given by mistake, as a rule."""
    found = os.fspath(path)
    if "\0" in found or any(
            len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in Path(found).parts):
        raise InputError(f"{owner}: {name} is {short(found)}; it must be a path, and this one is too long, or holds a "
                         "null character (texts are given as samples: [{\"text\": \"…\"}, …])")
    return Path(found)


def check_seed(owner: str, seed: object) -> None:
    """InputError unless `seed` is one that torch's generators take."""
    if type(seed) is not int or not -2**63 <= seed < 2**64:
        raise InputError(f"{owner}: seed is {short(seed)}; it must be a whole number from -2**63 to 2**64 - 1")


def check_types(owner: str, settings: Any) -> None:
    """InputError for a field whose value is not of its declared type: a Literal's values, int, float, bool, str, texts;
    and for a whole number that is too large."""
    for name, declared in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        choices = get_args(declared) if get_origin(declared) is Literal else ()
        if choices and value not in choices:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be one of {', '.join(map(str, choices))}")
        kinds = [kind for kind in (get_args(declared) or (declared,)) if kind in (int, float, bool, str)]
        optional = type(None) in get_args(declared) and value is None
        if kinds and not choices and not optional and get_origin(declared) in (None, UnionType):
            fits = type(value) in kinds or (float in kinds and type(value) is int)
            if tuple[str, ...] in get_args(declared) and isinstance(value, tuple | list):
                fits = all(isinstance(each, str) for each in value)
            if not fits:
                raise InputError(f"{owner}: {name} is {short(value)}; it must be {' or '.join(map(_name, kinds))}")
            if type(value) is int and float not in kinds and name != "seed" and abs(value) > MAX_WHOLE:
                raise InputError(f"{owner}: {name} is {short(value)}; it must be at most {MAX_WHOLE}")


def _name(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text, or a list of texts"}[kind]


def is_number(value: object) -> bool:
    """True is none, though Python calls it an int."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value <= sys.float_info.max:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a positive, finite number")


def check_from_one(owner: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a whole number of at least 1")


def check_at_least_zero(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= sys.float_info.max:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a finite number of at least 0")
