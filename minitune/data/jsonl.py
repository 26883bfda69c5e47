"""Reads JSONL strictly: every line is one JSON object, and whatever is wrong is named as file:line."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.errors import InputError

MAX_LINE = 64 * 2**20
"""The longest line that is read, in bytes: what bounds the memory that a broken file can take."""

_MAY_BE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(path: str | Path, *, max_line: int = MAX_LINE) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each line of `path` that is not blank.

    UTF-8; a byte order mark at the file's start is skipped, since editors on Windows write one. Refused with an
    InputError that names file:line: malformed or too deeply nested JSON, anything but an object, a key given twice, NaN
    and infinite numbers, lone surrogates, bytes that are not UTF-8, a line of more than `max_line` bytes (refused after
    reading that many), and a file without any sample. Memory: one line.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}; give a JSONL file")
    samples = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        number = 0
        while line := file.readline(max_line + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > max_line:
                raise InputError(f"{where}: the line is longer than {max_line:,} bytes; put one sample on each line")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                samples += 1
                yield number, _parse(line, where)
    if not samples:
        raise InputError(f"{path}: holds no samples; write one JSON object a line")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").rstrip(" \t\r\n")      # else a fault at the end would be in column 1 of a next line
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {line[error.start]:#04x} at byte {error.start + 1} of the line); "
                         "save the file as UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
        if _MAY_BE_SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {_fault(error, text)}; {_advice(text)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply to be a sample") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds the lone surrogate {error.object[error.start]!r}, which is no character; "
                         "write both halves of the pair or the character itself") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        kind = _JSON_NAMES.get(type(value), "a number")
        raise InputError(f"{where}: holds {kind}, not a JSON object; {_advice(text)}")
    return value


def _fault(error: json.JSONDecodeError, text: str) -> str:
    if error.pos >= len(text):
        return "the line ends before its JSON does"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _advice(text: str) -> str:
    if text.lstrip().startswith("["):
        return "a JSON array must be written as one object a line"
    return "write one JSON object a line"


_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} is given twice; keep one")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number; write a finite one")


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large; write a finite one")
    return value


__all__ = ["MAX_LINE", "read_jsonl"]
