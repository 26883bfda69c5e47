"""Tables for a terminal: drawn by rich where there is one, plain text elsewhere; a model's text is never markup."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from minitune.report.terminal import one_line

WIDTH = 100
"""Columns of plain text."""


@dataclass(frozen=True)
class Compared:
    """One question, the model's answers before and after training, and the phrase that the answer should hold."""

    question: str
    before: str
    after: str
    phrase: str | None = None

    @property
    def learned(self) -> bool | None:
        """True if the phrase is missing before and there after (case as written); None without a phrase."""
        return None if self.phrase is None else self.phrase not in self.before and self.phrase in self.after


def print_answers(answers: Sequence[Compared], stream: TextIO | None = None) -> None:
    """Print the answers before beside those after, with a mark for each that has a phrase."""
    stream = sys.stdout if stream is None else stream
    title, marked = "Before and after", any(a.learned is not None for a in answers)
    columns = ["question", "before", "after", *(["learned"] if marked else [])]
    rows = [[a.question, a.before, a.after, *([_mark(a.learned)] if marked else [])] for a in answers]
    if stream.isatty():
        print_table(title, columns, rows, stream)
        return
    print(title, file=stream)
    for row in rows:
        print(file=stream)
        for name, cell in zip(columns, row, strict=True):
            print(textwrap.fill(one_line(cell) or "(nothing)", WIDTH, initial_indent=f"  {name:<9} ",
                                subsequent_indent=" " * 12), file=stream)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]],
                stream: TextIO | None = None) -> None:
    """Print a table; numbers are given as they shall be read."""
    stream = sys.stdout if stream is None else stream
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    if stream.isatty() and _print_rich(title, columns, cells, stream):
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    print(title, file=stream)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=stream)


def _print_rich(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], stream: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=title, show_lines=any(len(cell) > 30 for row in cells for cell in row))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(table)
    return True


def _mark(learned: bool | None) -> str:
    return "" if learned is None else "yes" if learned else "NO"
