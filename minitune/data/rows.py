"""Rows: the raw samples of a data file, whatever kind of file it is, each with the place that messages name."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minitune.data.jsonl import MAX_LINE, UTF_16, decode_value, open_data, read_jsonl
from minitune.errors import InputError

KINDS = "a file of JSON lines, a .json array, a .txt or .md text, or a .parquet table"
MAX_TEXT = 2**30
"""The largest text file that is read, in bytes: it is one document, and held whole."""

_CHUNK = 2**20
_LIST = re.compile(r'\{\s*"([^"\\]{1,40})"\s*:\s*\[\s*\{')
_SHOWN = 12
_PARQUET_ROWS = 256
_ADVICE = {
    ".csv": "write it as JSON lines or Parquet", ".tsv": "write it as JSON lines or Parquet",
    ".xlsx": "write it as JSON lines or Parquet", ".arrow": "write it as JSON lines or Parquet",
    ".yaml": "write it as JSON lines", ".yml": "write it as JSON lines", ".gz": "unpack it first",
    ".bz2": "unpack it first", ".xz": "unpack it first", ".zst": "unpack it first", ".zip": "unpack it first",
    ".pkl": "pickles are refused unread", ".pt": "pickles are refused unread",
}


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) for each raw sample of a file, in the file's order; ``where`` is "file:line".

    By the file's ending: ``.json`` holds an array of objects, or objects one after the other; ``.txt`` and ``.md`` are
    one row {"text"}; ``.parquet`` is a table (it needs pyarrow), with "file: row 3" as ``where``; all else is JSONL.
    Objects in a table's column share their fields, so one that is null in a row is taken as absent from it. In a JSON
    array ``where`` names the line on which the row begins. All are UTF-8, with or without a byte order mark, and
    as strict as `read_jsonl`. Memory: the largest row and a window of 1 MiB, or a few hundred rows of a table.
    Raises InputError that names file and line for whatever is wrong, and for a file without rows.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _ADVICE and path.is_file():
        raise InputError(f"{path}: files that end in {suffix} are not read; {_ADVICE[suffix]} (give {KINDS})")
    if suffix == ".json":
        return _read_json(path)
    if suffix in (".txt", ".md"):
        return _read_text(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    return read_jsonl(path)


def _read_text(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_data(path, KINDS) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise InputError(f"{path}: a text file is one document and may have up to {MAX_TEXT:,} bytes; split it")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1 + content.count(b"\n", 0, error.start), content, error.start) from error
    if not text.strip():
        raise InputError(f"{path}: holds no text; write some")
    yield f"{path}:1", {"text": text}


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    open_data(path, KINDS).close()
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet is read through pyarrow, which is not installed; "
                         "pip install 'minitune[parquet]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}: has two columns named {twice!r}; rename or remove one")
            nested = {field.name: field.type for field in schema if pyarrow.types.is_nested(field.type)}
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield f"{path}: row {number}", row | {
                        name: _without_nulls(row[name], kind) for name, kind in nested.items()}
    except (pyarrow.ArrowException, UnicodeError, OSError, ValueError, KeyError) as error:
        fault = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as Parquet after row {number} ({fault}); write it again") from error
    if not number:
        raise InputError(f"{path}: holds no samples; write one a row")


def _without_nulls(value: Any, kind: Any) -> Any:
    """`value`, of the Arrow type `kind`, without the fields of its structs that are null: Arrow gives each struct of a
    column the fields of all of them. Elements of lists and values of maps, which it makes up for nobody, stay."""
    import pyarrow.types as types

    if value is None or not types.is_nested(kind):
        return value
    if types.is_struct(kind):
        return {field.name: _without_nulls(value[field.name], field.type) for field in kind
                if value[field.name] is not None}
    if types.is_map(kind):
        return {key: _without_nulls(item, kind.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nulls(item, kind.value_type) for item in value]
    return value


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_data(path, KINDS) as file:
        window = _Window(file, path)
        begun = window.peek()
        if not begun:
            raise InputError(f"{path}: holds no samples; write an array of JSON objects")
        if begun != "[":
            while begun:
                yield window.element(" (objects stand in an array, or one after the other without a comma)")
                begun = window.peek()
            return
        window.at += 1
        if window.peek() == "]":
            raise InputError(f"{path}: holds no samples; its array is empty")
        while True:
            yield window.element("")
            mark = window.peek()
            if mark != ",":
                break
            window.at += 1
            window.peek()
        if mark != "]":
            raise InputError(f"{window.where()}: {window.found()} after a sample of the array; "
                             'write "," between two samples and "]" behind the last')
        window.at += 1
        if window.peek():
            raise InputError(f"{window.where()}: {window.found()} behind the end of the array; remove it")


class _Window:
    """A part of a JSON file that moves forward: ``text`` from the file, ``at`` how far it is used."""

    _BLANK = re.compile(r"[ \t\r\n]*")

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self.text, self.at = "", 0
        self.line, self.counted = 1, 0      # the line of text[counted]
        self.gone = 0       # how much of the line at the text's start has been let go
        self.ended = False

    def where(self) -> str:
        """ "file:line" of the place that is read."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return f"{self.path}:{self.line}"

    def found(self) -> str:
        """What stands at this place, for a message."""
        if not self.peek():
            return "the file ends"
        while len(self.text) - self.at < _SHOWN and self.more():
            pass
        return repr(self.text[self.at:self.at + _SHOWN].split("\n")[0])

    def more(self) -> bool:
        """Reads on, as much again as is held, and lets go of what is used. False at the end of the file."""
        if self.ended:
            return False
        self.where()
        newline = self.text.rfind("\n", 0, self.at)
        self.gone = self.at - newline - 1 if newline >= 0 else self.gone + self.at
        self.text, self.at, self.counted = self.text[self.at:], 0, 0
        content = self.file.read(max(_CHUNK, len(self.text)))
        self.ended = not content
        try:
            self.text += self.decoder.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _not_utf8(self.path, line, error.object, error.start) from error
        return True

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the file; ``at`` stands on it."""
        while True:
            blank = self._BLANK.match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def element(self, hint: str) -> tuple[str, dict[str, Any]]:
        """(where, object) of the object that begins here."""
        where = self.where()
        if self.peek() != "{":
            raise InputError(f"{where}: {self.found()} where a sample must begin, which is a JSON object {{…}}{hint}")
        while True:
            try:
                value, end = decode_value(self.text, self.at, where)
                self.at = end
                return where, value
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if len(self.text) - self.at > MAX_LINE:
                    inner = _LIST.match(self.text, self.at)
                    advice = "close it, or split it" if inner is None else (
                        f"if {inner[1]!r} holds the samples, write that list alone into a .json file")
                    raise InputError(f"{where}: the sample that begins here is longer than {MAX_LINE:,} characters, "
                                     f"or never ends; {advice}") from error
                if not (unfinished and self.more()):
                    raise self._broken(error) from error

    def _broken(self, error: json.JSONDecodeError) -> InputError:
        begun = self.where()
        line = self.line + self.text.count("\n", self.at, error.pos)
        since = "" if line == self.line else f", in the sample that begins on line {self.line}"
        if error.pos >= len(self.text.rstrip()):
            return InputError(f"{begun}: not valid JSON: the file ends before the sample that begins here does")
        newline = self.text.rfind("\n", 0, error.pos)
        column = error.pos - newline if newline >= 0 else self.gone + error.pos + 1
        return InputError(f"{self.path}:{line}: not valid JSON: {error.msg.removesuffix(' at')} at column "
                          f"{column}{since}; correct it")


def _not_utf8(path: Path, line: int, content: bytes, place: int) -> InputError:
    begun = line == 1 and place == 0 and content.startswith(UTF_16)
    what = "is UTF-16, not UTF-8" if begun else f"not UTF-8 (byte {content[place]:#04x})"
    return InputError(f"{path}:{line}: {what}; save the file as UTF-8")


__all__ = ["KINDS", "MAX_TEXT", "read_rows"]
