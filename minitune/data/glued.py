"""glued: the note on completions that stick to their prompts, "the answer is" and "42" as "the answer is42"."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from minitune.data.ledger import PLACES, Ledger, Note

if TYPE_CHECKING:
    from minitune.data.document import Document
    from minitune.data.stream import Stream
    from minitune.data.tokenizer import Tokenizer

LOOKED_AT = 200
"""So many samples, evenly spread: a file whose completions lack the blank lacks it throughout."""
SEEN = 8
"""Tokens that are read on either side of where a completion begins."""
SPACED = 0x590
"""Below it stand the letters of scripts that put blanks between words, as Latin, Greek and Cyrillic do."""


def with_glued(stream: Stream, ledger: Ledger, tokenizer: Tokenizer | None) -> Ledger:
    """`ledger` with the note in front, where most of the samples of `stream` that were looked at are glued.

    That is when what comes before the first trained token ends with a letter or digit and that token begins with one,
    so the model learns to go on in the middle of a word. Chat templates write something between the two.
    """
    if tokenizer is None:
        return ledger
    ends = [0, *itertools.accumulate(part.kept.numel() for part in stream.parts)]
    looked, hits = 0, []
    for place in spread(ends[-1], LOOKED_AT):
        at = bisect.bisect_right(ends, place) - 1
        corpus, index = stream.parts[at].corpus, int(stream.parts[at].kept[place - ends[at]])
        start, end = corpus.bounds[index : index + 2].tolist()
        seam = _seam(corpus.document(index, start, end), tokenizer)
        if seam is not None:
            looked += 1
            hits += [corpus.where(index)] if _sticks(*seam) else []
    if not hits or 2 * len(hits) <= looked:
        return ledger
    among = "" if looked == len(hits) == ends[-1] else f", of {looked:,} looked at"
    names = ("answer", "chosen") if stream.pairs else ("completion", "completion")
    note = Note(f"the {names[0]} begins right behind the prompt's last word{among}: begin {names[0]}s with a blank, as "
                f'in "{names[1]}": " Yes."', len(hits), tuple(hits[:PLACES]))
    return replace(ledger, notes=(note, *ledger.notes))


def spread(count: int, n: int) -> list[int]:
    """`n` of the indices below `count`, or all, evenly spread from the first."""
    n = min(n, count)
    return [place * count // n for place in range(n)]


def _seam(document: Document, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """The texts before and behind the first trained token; None where nothing comes before it, or none is trained."""
    at = next((place for place, trained in enumerate(document.trained) if trained), 0)
    if at < 2:      # BOS alone
        return None
    before, behind = list(document.ids[max(0, at - SEEN) : at]), list(document.ids[at : at + SEEN])
    return (tokenizer.decode(before, skip_special=False, continues=True),
            tokenizer.decode(behind, skip_special=False, continues=True))


def _sticks(before: str, behind: str) -> bool:
    return all(c.isalnum() and ord(c) < SPACED for c in (before[-1:], behind[:1]) if c) and bool(before and behind)
