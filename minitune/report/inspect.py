"""What a data set is, on a screen: its ledger, its notes, how long its samples are, and what of them is trained.

In a terminal trained tokens are coloured. Without one, or without colours (NO_COLOR, TERM=dumb), they stand between
« and ».
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TextIO
from unicodedata import category

from minitune.data.document import Document
from minitune.data.ledger import COLUMNS, PLACES, Ledger, Note
from minitune.data.pieces import cut
from minitune.report.tables import print_table

if TYPE_CHECKING:
    from minitune.data.corpus import Corpus
    from minitune.data.stream import Stream
    from minitune.data.tokenizer import Tokenizer

SHOWN = 512
"""Tokens of a sample that are shown at most."""
BAR = 40
"""Columns of the longest bar of a histogram."""
_UNSEEN = ("Cc", "Cs", "Co")
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FIRST, LAST = 2.0, 30.0
"""Seconds before the first line of progress, and the most between two."""


def print_ledger(ledger: Ledger, stream: TextIO | None = None, title: str = "Where the tokens go") -> None:
    """Print the table of a ledger, its first epoch, and its notes."""
    stream = sys.stdout if stream is None else stream
    print_table(title, COLUMNS, ledger.rows(), stream)
    _say(ledger.summary, stream)
    for note in ledger.notes:
        _say(f"note: {note}", stream)


def print_lengths(lengths: Sequence[int], tokens: int, stream: TextIO | None = None) -> None:
    """Print a histogram of lengths in tokens, in powers of two; those above `tokens` are marked."""
    stream = sys.stdout if stream is None else stream
    counts = Counter(max(0, (length - 1).bit_length()) for length in lengths)
    most = max(counts.values())
    rows = []
    for power in range(min(counts), max(counts) + 1):
        low, high, count = (2**(power - 1) + 1 if power else 1), 2**power, counts[power]
        too_long = sum(length > tokens for length in lengths) if low <= tokens < high and count else 0
        mark = " too long for a row" if low > tokens and count else f" {too_long:,} too long" if too_long else ""
        rows.append([f"{low:,} - {high:,}" if low < high else f"{high:,}", f"{count:,}",
                     "#" * -(-count * BAR // most) + mark])
    ordered = sorted(lengths)
    print_table(f"Lengths in tokens: median {ordered[len(ordered) // 2]:,}, longest {ordered[-1]:,}",
                ["tokens", "samples", ""], rows, stream)


def print_sample(document: Document, tokenizer: Tokenizer, stream: TextIO | None = None) -> None:
    """Print a document's text with its trained tokens coloured, or between « and »; at most SHOWN tokens of it."""
    from rich.console import Console
    from rich.text import Text

    stream = sys.stdout if stream is None else stream
    console = Console(file=stream, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    weight = "" if document.weight is None else f", weight {document.weight:g}"
    head = f"{document.where}: {len(document):,} tokens, {document.n_trained:,} trained{weight}"
    rest = len(document) - SHOWN
    tail = f"\n… and {rest:,} tokens more" if rest > 0 else ""
    runs = trained_runs(document, tokenizer)
    if not coloured:
        _say(f"{head}\n{''.join(f'«{text}»' if trained else text for text, trained in runs)}{tail}", stream)
        return
    shown = Text()
    for text, trained in runs:
        shown.append(text, style="bold green" if trained else "dim")
    console.print(Text(head, style="bold"), shown.append(tail, style="default"), sep="\n")


def trained_runs(document: Document, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether it is trained) of each run of the first SHOWN tokens; control characters are made visible, since
    an escape sequence would act on the terminal."""
    pairs = list(zip(document.ids, document.trained, strict=True))[:SHOWN]
    found: list[tuple[str, bool]] = []
    for trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        text = tokenizer.decode([number for number, _ in run], skip_special=False, continues=bool(found))
        found.append((visible(text), trained))
    return found


def visible(text: str) -> str:
    """`text` with line breaks as they are, and written out what would act on a terminal or reorder its text: other
    control characters, marks of direction, surrogates, characters of private use."""
    return "".join(_written_out(c) if c != "\n" and (c in _DIRECTION or category(c) in _UNSEEN) else c for c in text)


def _written_out(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def reading(stream: TextIO | None = None) -> Callable[[str, int, int], None]:
    """A progress for `mt.data.stream`: a line after FIRST seconds, the next after twice as long, and so on up to LAST.
    Lines of their own, since what is printed next cannot know of a line that waits to be overwritten."""
    to = sys.stderr if stream is None else stream
    begun = time.monotonic()
    due, wait = begun + FIRST, FIRST

    def tell(path: str, samples: int, tokens: int) -> None:
        nonlocal due, wait
        now = time.monotonic()
        if now >= due:
            wait = min(2 * wait, LAST)
            due = now + wait
            _say(f"reading {path}: {samples:,} samples, {tokens:,} tokens so far", to)

    return tell


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
    note = Note(f"longer than {tokens:,} tokens, so training refuses them: raise --tokens to {longest:,}, or say "
                "--long split or truncate", len(places),
                tuple(corpus.where(index) for corpus, index in places[:PLACES]))
    return replace(stream.ledger, notes=(note, *stream.ledger.notes))


def packed(stream: Stream, n: int) -> Iterator[Document]:
    """`n` of what `stream` packs, evenly spread: samples, and the pieces of those that are too long for a row. A first
    token is no target."""
    cuts = [cut(part.corpus, part.kept, stream.tokens, stream.long) for part in stream.parts]
    places = [(part, pieces, at) for part, pieces in zip(stream.parts, cuts, strict=True)
              for at in range(len(pieces.owners))]
    for place in spread(len(places), n):
        part, pieces, at = places[place]
        owner, start, end = int(pieces.owners[at]), int(pieces.starts[at]), int(pieces.ends[at])
        document = part.corpus.document(owner, start, end)
        yield Document(document.ids, [0, *document.trained[1:]], document.weight, document.where)


def spread(count: int, n: int) -> list[int]:
    """`n` of the indices below `count`, or all, evenly spread from the first."""
    n = min(n, count)
    return [place * count // n for place in range(n)]


def _say(text: str, stream: TextIO) -> None:
    """Print text that a stream of a narrow encoding can't hold with a ? for each character that it lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream)


def print_samples(documents: Iterable[Document], tokenizer: Tokenizer, stream: TextIO | None = None) -> None:
    """`print_sample` for each, a blank line before it."""
    for document in documents:
        _say("", sys.stdout if stream is None else stream)
        print_sample(document, tokenizer, stream)


__all__ = ["packed", "print_ledger", "print_lengths", "print_sample", "print_samples", "reading", "refused", "spread",
           "trained_runs", "visible"]
