"""print_ledger: the ledger of a data set as a table, its first epoch, and its notes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

from minitune.data.ledger import COLUMNS, Ledger
from minitune.report.tables import print_table
from minitune.report.terminal import say


def print_ledger(ledger: Ledger, stream: TextIO | None = None, title: str = "Where the tokens go") -> None:
    """Print the table of a ledger, its first epoch, and its notes."""
    stream = sys.stdout if stream is None else stream
    print_table(title, COLUMNS, ledger.rows(), stream)
    say(ledger.summary, stream)
    for note in ledger.notes:
        say(f"note: {note}", stream)


def print_ledgers(ledgers: Mapping[str, Ledger], stream: TextIO) -> None:
    """The ledgers of "train" and "valid", with their notes."""
    for name, ledger in ledgers.items():
        print_ledger(ledger, stream, "Held out" if name == "valid" else "Where the tokens go")
    stream.flush()
