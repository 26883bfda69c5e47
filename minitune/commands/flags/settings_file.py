"""A command's settings as TOML that --config reads, what was given and what is not the default, in a run's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minitune.checkpoint.files import staged
from minitune.commands.flags.declared import Given, settings
from minitune.training.run import Observer, Run, RunInfo

SETTINGS = "train.toml"
"""The file in a run's folder."""


class SettingsFile(Observer):
    """Writes `text` into SETTINGS of a run's folder; a run that ended before its first step leaves no such file. The
    file of a run that goes on stays as it was, unless settings were `changed`."""

    def __init__(self, folder: Path, text: str, changed: bool = False) -> None:
        self.folder, self.text, self.changed, self._begun = folder, text, changed, False

    def on_start(self, info: RunInfo) -> None:
        self._begun = True
        self._write()

    def _write(self) -> None:
        with staged(self.folder) as staging:
            staging.write(SETTINGS, self.text.encode())

    def on_resume(self, run: Run) -> None:
        if self.changed:
            self._write()

    def on_end(self, run: Run) -> None:
        if self._begun and not run.records:
            (self.folder / SETTINGS).unlink(missing_ok=True)


def as_toml(command: Any, given: Given, leave: Collection[str] = ()) -> str:
    """The settings of `command` that are not the defaults, and those `given`, but for `leave`; those in its nested
    dataclasses as tables. Paths are written out from the root, so that the file can be used in any folder."""
    lines: list[str] = []
    table = ""
    for path in sorted(settings(type(command)), key=len):
        value, default = command, _default(command, path[0])
        for name in path:
            value = getattr(value, name)
        if len(path) > 1 and default is not None:
            default = getattr(default, path[-1])
        if path[-1] in leave or value is None or (value == default and path not in given):
            continue
        if len(path) > 1 and path[0] != table:
            table = path[0]
            lines += ["", f"[{table}]"]
        lines.append(f"{path[-1]} = {_written(value)}")
    return "\n".join(lines) + "\n"


def _default(command: Any, name: str) -> Any:
    field = type(command).__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Path):
        return _written(str(value.absolute()))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(key)} = {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")       # TOML's basic strings are JSON's
