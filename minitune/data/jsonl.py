"""Reads JSONL strictly: every line is one JSON object, and whatever is wrong is named as file:line."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minitune.errors import InputError
from minitune.names import nearest_path

MAX_LINE = 64 * 2**20
"""The longest line that is read, in bytes: what bounds the memory that a broken file can take."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
_MAY_BE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_data(path: Path, kind: str) -> BinaryIO:
    """The opened file; InputError where there is none, it is a folder, or cannot be read. ``kind``: what to give."""
    if path.is_dir() or not path.exists():
        there = "is a folder, not a file" if path.is_dir() else f"no such file{nearest_path(path)}"
        raise InputError(f"{path}: {there}; give {kind}")
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, object) for each line of `path` that is not blank; ``where`` is "file:line", lines from 1.

    UTF-8; a byte order mark at the file's start is skipped, since editors on Windows write one. Refused with an
    InputError that names file:line: malformed or too deeply nested JSON, anything but an object, a key given twice, NaN
    and infinite numbers, lone surrogates, bytes that are not UTF-8, a line of more than MAX_LINE bytes (refused after
    reading that many), and a file without any sample. Memory: one line.
    """
    name = str(path)
    samples = number = 0
    with open_data(Path(path), "a JSONL file") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_LINE:
                raise InputError(f"{where}: the line is longer than {MAX_LINE:,} bytes; put one sample on each line")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                samples += 1
                yield where, _parse(line, where)
    if not samples:
        raise InputError(f"{path}: holds no samples; write one JSON object a line")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").rstrip(" \t\r\n")      # else a fault at the end would be in column 1 of a next line
    except UnicodeDecodeError as error:
        if line.startswith(b"\x1f\x8b"):
            raise InputError(f"{where}: is packed by gzip, whatever its name says; unpack it first") from error
        if line.startswith(UTF_16):
            raise InputError(f"{where}: is UTF-16, not UTF-8; save the file as UTF-8") from error
        raise InputError(f"{where}: not UTF-8 (byte {line[error.start]:#04x} at byte {error.start + 1} of the line); "
                         "save the file as UTF-8") from error
    start = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = decode_value(text, start, where)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {_fault(error, text)}; {_advice(text)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {_NAMES.get(type(value), 'a number')}, not a JSON object; {_advice(text)}")
    return value


def decode_value(text: str, start: int, where: str) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends.

    json.JSONDecodeError where it is malformed or unfinished; InputError that begins with `where` for a key given twice,
    NaN and infinite numbers, lone surrogates and what nests too deeply.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        if text.find("\\u", start, end) >= 0 and _MAY_BE_SURROGATE.search(text, start, end):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply to be a sample") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds the lone surrogate {error.object[error.start]!r}, which is no character; "
                         "write both halves of the pair or the character itself") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    return value, end


def _fault(error: json.JSONDecodeError, text: str) -> str:
    if error.pos >= len(text):
        return "the line ends before its JSON does"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _advice(text: str) -> str:
    if text.lstrip().startswith("["):
        return "a JSON array must be written as one object a line, or the file be named .json"
    return "write one JSON object a line"


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


def _whole(digits: str) -> int:
    if len(digits) > 1000:      # Python refuses some thousands, in words of its own
        raise ValueError(f"the number {digits[:40]} is too large; write a smaller one")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number,
                            parse_int=_whole)

__all__ = ["MAX_LINE", "UTF_16", "decode_value", "open_data", "read_jsonl"]
