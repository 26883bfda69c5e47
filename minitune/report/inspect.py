"""Samples on a screen: how long they are, which are too long, and what of them is trained.

In a terminal trained tokens are coloured. Without one, or without colours (NO_COLOR, TERM=dumb), they stand between
« and ».
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from minitune.data.glued import spread
from minitune.data.ledger import PLACES, Ledger, Note
from minitune.report.tables import print_table
from minitune.report.terminal import say, visible

if TYPE_CHECKING:
    from minitune.data.corpus import Corpus
    from minitune.data.document import Document
    from minitune.data.stream import Stream
    from minitune.data.tokenizer import Tokenizer

SHOWN = 512
"""Tokens of a sample that are shown at most."""
LONG = {"refuse": "too long for a row", "split": "split into rows", "truncate": "truncated to a row",
        "drop": "too long for a row: dropped"}
"""What becomes of samples that are longer than a row, by ``Data.long``."""
REJECTED = "\n--- rejected:\n"
"""What stands between the two answers of a pair."""
BAR = 40
"""Columns of the longest bar of a histogram."""


def print_lengths(lengths: Sequence[int], tokens: int, stream: TextIO | None = None, *,
                  what: str = LONG["refuse"]) -> None:
    """Print a histogram of lengths in tokens, in powers of two; those above `tokens` are marked: `what` becomes of
    them."""
    stream = sys.stdout if stream is None else stream
    counts = Counter(max(0, (length - 1).bit_length()) for length in lengths)
    most = max(counts.values())
    rows = []
    for power in range(min(counts), max(counts) + 1):
        low, high, count = (2**(power - 1) + 1 if power else 1), 2**power, counts[power]
        too_long = sum(length > tokens for length in lengths) if low <= tokens < high and count else 0
        mark = f" {what}" if low > tokens and count else f" {too_long:,} {what}" if too_long else ""
        rows.append([f"{low:,} - {high:,}" if low < high else f"{high:,}", f"{count:,}",
                     "#" * -(-count * BAR // most) + mark])
    ordered = sorted(lengths)
    print_table(f"Lengths in tokens: median {ordered[len(ordered) // 2]:,}, longest {ordered[-1]:,}",
                ["tokens", "samples", ""], rows, stream)


def print_sample(document: Document, tokenizer: Tokenizer, stream: TextIO | None = None) -> None:
    """Print a document's text with its trained tokens coloured, or between « and »; at most SHOWN tokens of it, of a
    pair of each answer."""
    from rich.console import Console
    from rich.text import Text

    stream = sys.stdout if stream is None else stream
    console = Console(file=stream, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    weight = "" if document.weight is None else f", weight {document.weight:g}"
    head = f"{document.where}: {len(document):,} tokens, {document.n_trained:,} trained{weight}"
    rest = 0 if document.rejected_at else len(document) - SHOWN
    tail = f"\n… and {rest:,} tokens more" if rest > 0 else ""
    runs = trained_runs(document, tokenizer)
    if not coloured:
        say(f"{head}\n{''.join(f'«{text}»' if trained else text for text, trained in runs)}{tail}", stream)
        return
    shown = Text()
    for text, trained in runs:
        shown.append(text, style="bold green" if trained else "dim")
    console.print(Text(head, style="bold"), shown.append(tail, style="default"), sep="\n")


def trained_runs(document: Document, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether it is trained) of each run of the first SHOWN tokens, of a pair those of both answers; control
    characters are made visible, since an escape sequence would act on the terminal."""
    tokens = list(zip(document.ids, document.trained, strict=True))
    if not document.rejected_at:
        return _runs(tokens[:SHOWN], tokenizer)
    chosen, rejected = tokens[:document.rejected_at], tokens[document.rejected_at:]
    return [*_runs_of_answer(chosen, tokenizer), (REJECTED, False), *_runs_of_answer(rejected, tokenizer)]


def _runs_of_answer(tokens: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The runs of the SHOWN tokens around the beginning of a pair's answer, behind the end of its prompt."""
    begin = next((place for place, (_, trained) in enumerate(tokens) if trained), 0)
    first = max(0, min(begin - SHOWN // 2, len(tokens) - SHOWN))
    before, behind = "… " * (first > 0), " …" * (first + SHOWN < len(tokens))
    return [(before, False), *_runs(tokens[first:first + SHOWN], tokenizer), (behind, False)]


def _runs(tokens: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Those of one text, of (id, whether it is trained)."""
    found: list[tuple[str, bool]] = []
    for trained, run in groupby(tokens, key=lambda token: bool(token[1])):
        text = tokenizer.decode([number for number, _ in run], skip_special=False, continues=bool(found))
        found.append((visible(text, keep="\n"), trained))
    return found


def refused(stream: Stream, tokens: int) -> Ledger:
    """The ledger of `stream` with a note on its samples that are longer than `tokens`, if there are any."""
    places: list[tuple[Corpus, int]] = []
    longest = 0
    for part in stream.parts:
        lengths = part.corpus.bounds.diff()[part.kept].tolist()
        places += [(part.corpus, index) for index, length in zip(part.kept.tolist(), lengths, strict=True)
                   if length > tokens]
        longest = max(longest, *lengths, 0)
    if not places:
        return stream.ledger
    ways = "say --long drop, since a pair is trained whole" if stream.pairs else "say --long split, truncate or drop"
    note = Note(f"longer than {tokens:,} tokens, so training refuses them: raise --tokens to {longest:,}, or {ways}",
                len(places),
                tuple(corpus.where(index) for corpus, index in places[:PLACES]))
    return replace(stream.ledger, notes=(note, *stream.ledger.notes))


def packed(stream: Stream, n: int) -> Iterator[Document]:
    """`n` of what `stream` packs, evenly spread: samples, and the pieces of those that are too long for a row."""
    return map(stream.document, spread(stream.n_pieces, n))


def print_samples(documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """`print_sample` for each, a blank line before it."""
    for document in documents:
        say("", sys.stdout)
        print_sample(document, tokenizer)
