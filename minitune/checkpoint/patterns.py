"""PEFT's rank_pattern and alpha_pattern: which key decides for a module, in bounded time, and how to write few keys."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from minitune.arguments import short
from minitune.errors import InputError

_LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)*")
_SIMPLE = re.compile(r"(?:[A-Za-z0-9_.*+?|()^$\-]|\[[A-Za-z0-9_.\-]*\]|\\[.dw])*")
MAX_SECONDS = 1.0


class Patterns:
    """A pattern table of adapter_config.json.

    peft takes the first key, in the order of the file, for which ``re.match(rf"(.*\\.)?({key})$", path)`` holds. Keys
    that are plain names or paths are looked up; regular expressions come from a stranger's file, so only small ones
    are run, and all of them together for at most ``MAX_SECONDS``.
    """

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self._where = where
        self._table = list(table.items())
        self._literal: dict[tuple[bool, str], int] = {}
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        self._seconds = 0.0
        for order, (key, _) in enumerate(self._table):
            if len(key) > 200:
                raise InputError(f"{where}: the pattern {short(key)} has {len(key):,} characters; at most 200 are read")
            if _LITERAL.fullmatch(key):
                name = key.replace("\\", "")
                self._literal.setdefault((name.startswith("^"), name.removeprefix("^")), order)
            else:
                self._regexes.append((order, self._compile(key)))

    def _compile(self, key: str) -> re.Pattern[str]:
        n_repeats, n_choices = sum(map(key.count, "*+?")), key.count("|")
        small = n_repeats <= 2 and n_choices <= 4 and not re.search(r"\)[*+?]|\(\?", key)
        if not small or not _SIMPLE.fullmatch(key):
            raise InputError(
                f"{self._where}: the pattern {short(key)} is too complex; use names, paths or simple regular "
                "expressions"
            )
        try:
            return re.compile(f"(?:{key})$")
        except re.error as error:
            raise InputError(f"{self._where}: {short(key)} is no regular expression: {error}") from None

    def find(self, path: str, default: Any) -> Any:
        """The value for a module path, or ``default`` where no key matches."""
        starts = [0, *(match.end() for match in re.finditer(r"\.", path))]
        orders = [self._literal.get((False, path[start:])) for start in starts]
        orders.append(self._literal.get((True, path)))
        best = min((order for order in orders if order is not None), default=len(self._table))
        for order, regex in self._regexes:
            if order > best:
                break
            began = time.perf_counter()
            matches = any(regex.match(path, start) for start in starts)
            self._seconds += time.perf_counter() - began
            if self._seconds > MAX_SECONDS:
                raise InputError(f"{self._where}: its patterns take too long to match; name the modules")
            if matches:
                best = order
                break
        return self._table[best][1] if best < len(self._table) else default


def compress(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Keys for the modules (by path) whose value is not ``default``: a short name where all that bear it agree.

    A short name stands only where it speaks for all of its modules, so keys never compete and their order is free.
    """
    by_name: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_name.setdefault(short_name(path), set()).add(value)
    result: dict[str, Any] = {}
    for path, value in values.items():
        name = short_name(path)
        if value != default:
            result[name if len(by_name[name]) == 1 else path] = value
    return result


def short_name(path: str) -> str:
    """The linear's own name: "q_proj"."""
    return path.rpartition(".")[2]


def same_in_every_layer(paths: list[str]) -> bool:
    """Whether every module path that is numbered has the same siblings under each number that occurs."""
    layers: dict[str, set[str]] = {}
    for path in paths:
        number_ = re.search(r"\.(\d+)\.", path)
        layers.setdefault(number_[1] if number_ else "", set()).add(path[number_.end() :] if number_ else path)
    return len({frozenset(each) for key, each in layers.items() if key}) <= 1
