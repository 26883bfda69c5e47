"""--config FILE.toml: a file's settings as the defaults of a command; flags win over them.

A key is a flag's name (hyphens or underscores). Tables may mirror the dataclasses ([lora] rank = 8), and the same keys
work flat. Paths in the file start where the command is run, as those of flags do.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

from tyro import MISSING

from minitune.arguments import short
from minitune.commands.flags.declared import Misfit, choices, convert, describe, options, settings
from minitune.commands.flags.suggestions import done_here, instead, instead_of_value
from minitune.errors import InputError
from minitune.names import nearest

LARGEST = 1 << 18
"""Bytes. A larger file is hardly one of settings."""
T = TypeVar("T")


def read_defaults(command: type[T], file: Path) -> tuple[T, set[tuple[str, ...]]]:
    """(`command` with the settings of a TOML file, the paths of those that it gives). What neither the file nor the
    class gives is tyro's MISSING.

    Raises InputError that names the file, the line where it can be found, the key, the value and what to do.
    """
    source = _Source(file)
    known = {path: hint for path, hint in settings(command).items() if path != ("config",)}
    given: dict[tuple[str, ...], Any] = {}
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}
    for keys, value in _leaves(source.table, known):
        path = _path_of(keys, known, source)
        if path in seen:
            raise InputError(f"{source.at(keys)}: {'.'.join(keys)} sets again what {'.'.join(seen[path])} sets; keep "
                             "one of them")
        seen[path] = keys
        try:
            given[path] = convert(value, known[path])
        except Misfit:
            raise InputError(f"{source.at(keys)}: {'.'.join(keys)} is {short(value)}; it must be "
                             f"{describe(known[path])}{_instead(value, known[path])}") from None
    return _build(command, given, seen, source), set(given)


class _Source:
    """A TOML file: its table, and where a key of it stands."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.exists():
            raise InputError(f"{file}: there is no such file; --config takes a TOML file of settings, such as the "
                             "train.toml that a run writes into its folder")
        raw = file.read_bytes() if file.stat().st_size <= LARGEST else None
        if raw is None:
            raise InputError(f"{file}: has {file.stat().st_size:,} bytes; --config takes a TOML file of settings, of "
                             f"{LARGEST:,} bytes at most")
        try:
            self.text = raw.decode("utf-8-sig").replace("\r\n", "\n")
            self.table: dict[str, Any] = tomllib.loads(self.text)
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: byte {error.start} is not UTF-8; --config takes a TOML file") from None
        except tomllib.TOMLDecodeError as error:
            place = re.search(r" \(at line (\d+), column \d+\)", str(error))
            line, what = (f":{place[1]}", str(error).replace(place[0], "")) if place else ("", str(error))
            raise InputError(f"{file}{line}: not TOML: {what}; a setting is a line such as lr = 1e-4 or "
                             'targets = ["q_proj", "v_proj"]') from None
        except RecursionError:
            raise InputError(f"{file}: is nested too deeply; settings are lines such as lr = 1e-4") from None

    def at(self, keys: tuple[str, ...]) -> str:
        """file:line of the statement that gives a key, or the file alone: the line that has the key's name and before
        which the file is whole TOML without the key, and after the statement's end with it."""
        lines = self.text.split("\n")
        for start, line in enumerate(lines):
            if keys[-1] not in line or self._holds(lines[:start], keys) is not False:
                continue
            ends = (self._holds(lines[:end], keys) for end in range(start + 1, len(lines) + 1))
            if next((holds for holds in ends if holds is not None), False):
                return f"{self.file}:{start + 1}"
        return str(self.file)

    @staticmethod
    def _holds(lines: list[str], keys: tuple[str, ...]) -> bool | None:
        """Whether these lines give the key; None if they are no whole TOML."""
        try:
            table: Any = tomllib.loads("\n".join(lines))
        except tomllib.TOMLDecodeError:
            return None
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else None
        return table is not None


def _leaves(table: dict[str, Any], known: dict[tuple[str, ...], Any]) -> list[tuple[tuple[str, ...], Any]]:
    """(keys, value) of each setting; the tables of nested dataclasses are opened, those that are values are not."""
    groups = {path[:-1] for path in known}
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in table.items():
        if isinstance(value, dict) and ((_plain(key),) in groups or _is_table(key, value, known)):
            found += [((key, inner), each) for inner, each in value.items()]
        else:
            found.append(((key,), value))
    return found


def _is_table(key: str, value: dict[str, Any], known: dict[tuple[str, ...], Any]) -> bool:
    """Whether a table that is none here, or no table, holds a setting of one: it is told where that belongs."""
    hint = known.get((_plain(key),))
    if hint is not None and any(get_origin(each) in (dict, Mapping) for each in options(hint)):
        return False
    nested = {path[-1] for path in known if len(path) > 1}
    return nearest(key, {path[0] for path in known if len(path) > 1}) is None and any(
        _plain(inner) in nested for inner in value)


def _path_of(keys: tuple[str, ...], known: dict[tuple[str, ...], Any], source: _Source) -> tuple[str, ...]:
    """The setting that the keys of a file mean. InputError if there is none, or more than one."""
    *table, last = map(_plain, keys)
    fits = [path for path in known if path[-1] == last and (not table or path[:-1] == tuple(table))]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise InputError(f"{source.at(keys)}: {keys[0]} may be {' or '.join('.'.join(path) for path in fits)}; write "
                         "it into its table")
    groups = {path[0] for path in known if len(path) > 1}
    if len(keys) == 1 and keys[0] in groups:
        raise InputError(f"{source.at(keys)}: {keys[0]} is a table of settings; write [{keys[0]}] and the settings "
                         "below it")
    home = next((path[0] for path in known if len(path) > 1 and path[-1] == last), None)
    if table and home is not None:
        raise InputError(f"{source.at(keys)}: {short('.'.join(keys))} is no setting of this command; {last} belongs to "
                         f"[{home}]")
    every = {path[-1] for path in known}
    here = {path[-1] for path in known if not table or path[:-1] == tuple(table)} | groups
    hint = done_here(last, every) or instead(last, here) or f"; there are {', '.join(sorted(every))}"
    raise InputError(f"{source.at(keys)}: {short('.'.join(keys))} is no setting of this command{hint}")


def _build(owner: type[T], given: dict[tuple[str, ...], Any], seen: dict[tuple[str, ...], tuple[str, ...]],
           source: _Source) -> T:
    """The command itself is not constructed, since it may lack what flags will give; its parts are, and check it."""
    made: T = object.__new__(owner)
    parts: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        parts.setdefault(path[0], {})[path[-1]] = value
    for field in dataclasses.fields(owner):     # type: ignore[arg-type]
        value = MISSING
        if (field.name,) in given:
            value = given[field.name,]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            try:
                value = dataclasses.replace(field.default_factory(), **parts.get(field.name, {}))
            except InputError as error:
                raise InputError(f"{_blamed(str(error), field.name, seen, source)}: {error}") from None
        object.__setattr__(made, field.name, value)
    return made


def _blamed(message: str, table: str, seen: dict[tuple[str, ...], tuple[str, ...]], source: _Source) -> str:
    """file:line of the first setting of `table` that the message names."""
    for path, keys in seen.items():
        if path[0] == table and re.search(rf"\b{path[-1]}\b", message):
            return source.at(keys)
    return str(source.file)


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _instead(value: Any, hint: Any) -> str:
    return instead_of_value(value, [*map(str, choices(hint))]) if isinstance(value, str) and choices(hint) else ""
