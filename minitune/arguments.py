"""Arguments of functions under the names that other trainers give them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from minitune.errors import InputError
from minitune.names import unknown_names

P = ParamSpec("P")
R = TypeVar("R")


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
