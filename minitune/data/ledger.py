"""Ledger: where every raw token of a data set went, file by file, and what its reader should know before step 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PLACES = 10
"""Line numbers that a note names at most."""
COLUMNS = ("file", "samples", "tokens", "trained", "masked", "truncated", "dropped")
"""The columns of `Ledger.rows`."""


@dataclass(frozen=True)
class Note:
    """Something about a data set that is said before training: what, in how many samples, and the first of them."""

    text: str
    count: int
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(_shortened(self.places)) + (", …" if self.count > len(self.places) else "")
        return f"{_counted(self.count, 'sample')}: {self.text}{f' ({named})' if self.places else ''}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What became of the raw tokens of one file, each counted once: tokens = trained + masked + truncated + dropped.

    ``samples`` are the file's, ``documents`` those of them with something to pack, ``pieces`` what they were split into
    (as many, where none was split). ``masked`` are no target: prompts, BOS, the first token of each piece, and all of a
    piece in which nothing is trained, which is not packed.
    ``truncated`` were cut off, ``dropped`` belong to no document that is seen: ``reasons`` says of how many samples and
    tokens, and why. ``share``: how often each sample is seen in an epoch.
    """

    path: str
    share: float = 1.0
    samples: int
    documents: int
    pieces: int
    tokens: int
    trained: int
    masked: int
    truncated: int
    dropped: int
    reasons: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What the first epoch's batches hold: batches · row = trained + masked + filler."""

    samples: int
    batches: int
    row: int
    trained: int
    masked: int
    filler: int


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The account of a data set: its files (`Source`), its first epoch (`Epoch`), and ``notes``."""

    sources: tuple[Source, ...]
    epoch: Epoch
    epochs: int = 1
    notes: tuple[Note, ...] = ()

    def check(self) -> None:
        """RuntimeError unless both sums close: then tokens went astray, which is a fault of minitune."""
        for source in self.sources:
            found = source.trained + source.masked + source.truncated + source.dropped
            if found != source.tokens or source.dropped != sum(tokens for _, tokens in source.reasons.values()):
                raise RuntimeError(f"ledger: {source.path} has {source.tokens:,} tokens, of which {found:,} are "
                                   f"accounted for ({source}); please report this")
        epoch = self.epoch
        found = epoch.trained + epoch.masked + epoch.filler
        if found != epoch.batches * epoch.row:
            raise RuntimeError(f"ledger: {epoch.batches:,} batches of {epoch.row:,} tokens hold {found:,} ({epoch}); "
                               "please report this")

    @property
    def total(self) -> Source:
        """The sum of the files."""
        counted = ("samples", "documents", "pieces", "tokens", "trained", "masked", "truncated", "dropped")
        return Source(path="all files", **{name: sum(getattr(each, name) for each in self.sources)
                                           for name in counted})

    def rows(self) -> list[list[str]]:
        """A line of text cells for each file, under COLUMNS; the last one is the sum where there are several."""
        sources: Sequence[Source] = [*self.sources, self.total] if len(self.sources) > 1 else self.sources
        return [[_name(each), *(f"{getattr(each, name):,}" for name in COLUMNS[1:])] for each in sources]

    @property
    def summary(self) -> str:
        """The first epoch in one line."""
        epoch = self.epoch
        seen = epoch.trained + epoch.masked
        share = epoch.filler / max(1, epoch.batches * epoch.row)
        return (f"an epoch: {_counted(epoch.samples, 'sample')}, {seen:,} tokens + {epoch.filler:,} filler "
                f"({share:.1%}) = {_counted(epoch.batches, 'batch', 'batches')} of {epoch.row:,}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _counted(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _shortened(places: Iterable[str]) -> Iterator[str]:
    """"a:1", "a:2" as "a:1", "2"."""
    before = None
    for place in places:
        head = place.rstrip("0123456789")
        yield place if head != before or head == place else place[len(head):]
        before = head


def _name(source: Source) -> str:
    return source.path if source.share == 1 else f"{source.path} × {source.share:g}"


__all__ = ["COLUMNS", "PLACES", "Epoch", "Ledger", "Note", "Source"]
