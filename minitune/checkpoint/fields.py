"""Typed access to fields of a JSON object: a wrong one is refused with the file, the field, the value and the rule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from minitune.arguments import short
from minitune.errors import InputError

MAX_INT = 2**31 - 1


def refuse(where: str, name: str, value: object, rule: str) -> NoReturn:
    """Raise InputError: this field of this file has this value, and ``rule`` says what is supported."""
    raise InputError(f"{where}: {name} is {short(value)}; {rule}")


def same(value: object, allowed: object) -> bool:
    """Equality that holds True apart from 1, but not 1 from 1.0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def only(where: str, name: str, value: object, allowed: Collection[object], why: str = "") -> None:
    """Refuse every value but those that are known to change nothing; ``why`` begins what is said."""
    if not any(same(value, each) for each in allowed):
        refuse(where, name, value, f"{why}; supported: {', '.join(map(repr, allowed))}".removeprefix("; "))


@dataclass(frozen=True)
class Rule:
    """A field that nothing is read from: ``why`` that changes nothing, at any value or at these ``values`` alone."""

    why: str
    values: tuple[object, ...] | None = None

    def check(self, where: str, name: str, value: object) -> None:
        if self.values is not None:
            only(where, name, value, self.values, self.why)


def integer(where: str, name: str, value: object, low: int = 1, high: int = MAX_INT) -> int:
    if type(value) is not int or not low <= value <= high:  # type(): True is an int, too
        refuse(where, name, value, f"it must be an integer from {low:,} to {high:,}")
    return value


def number(where: str, name: str, value: object, low: float = 0.0, inclusive: bool = False) -> float:
    """A finite number above ``low`` (or equal to it, if ``inclusive``)."""
    if type(value) not in (int, float) or not _in_range(value, low, inclusive):
        refuse(where, name, value, f"it must be a number {'of at least' if inclusive else 'above'} {low:g}")
    return float(value)  # type: ignore[arg-type]


def _in_range(value: Any, low: float, inclusive: bool) -> bool:
    return abs(value) < 1e300 and math.isfinite(value) and (value > low or (inclusive and value == low))


def flag(where: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(where, name, value, "it must be true or false")
    return value


def text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(where, name, value, "it must be a string")
    return value


def texts(where: str, name: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        refuse(where, name, value, "it must be a list of strings")
    return value


def mapping(where: str, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, name, value, "it must be an object")
    return value


def token_ids(where: str, name: str, value: object) -> tuple[int, ...]:
    """Token ids from null, one id or a list of ids."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(integer(where, name, each, 0) for each in ids))
