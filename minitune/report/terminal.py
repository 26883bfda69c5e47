"""What a text of strangers may do on a screen: nothing but be read; and what a narrow encoding lacks becomes a ?."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, TextIO
from unicodedata import category

MARKS = "\u061c\u200e\u200f"
"""The marks of direction that Arabic and Hebrew text holds by itself."""
_REORDERING = frozenset(MARKS + "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSEEN = ("Cc", "Cs", "Co")
SPOKEN = "\n\t" + MARKS
"""What `visible` keeps of a model's answer."""


def visible(text: str, keep: str = "") -> str:
    """`text` with all written out that would act on a terminal or reorder what stands there: control characters (an
    escape sequence moves the cursor, sets a title, writes into the clipboard), marks of direction, surrogates,
    characters of private use. Those in `keep` stay as they are."""
    return "".join(_written_out(c) if c not in keep and (c in _REORDERING or category(c) in _UNSEEN) else c
                   for c in text)


def speak(piece: str) -> None:
    """Print a piece of a model's answer to stdout as it is written, on a terminal `visible`."""
    print(visible(piece, keep=SPOKEN) if sys.stdout.isatty() else piece, end="", flush=True)


def one_line(text: str) -> str:
    """`text` as a cell of a table: visible, and every run of blanks and line breaks one blank."""
    return visible(" ".join(text.split()))


def say(text: str, stream: TextIO) -> None:
    """Print text that a stream of a narrow encoding can't hold with a ? for each character that it lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream)


class WhileItTakes:
    """A stream whose writes are lost, without an error, once its terminal was closed or its reader has gone: what only
    shows a run's progress does not end it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _written_out(character: str) -> str:
    """As Python writes it in a literal."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
