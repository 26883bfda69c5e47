"""account: the Ledger of the files in a stream, and the notes on what a user would not expect of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitune.data.corpus import BLANK, ENDS, OPEN, SPOILT, Corpus
from minitune.data.ledger import PLACES, Note, Source
from minitune.data.pieces import Pieces


def _longer(tokens: int) -> str:
    return f"longer than {tokens:,} tokens"


@dataclass(frozen=True, eq=False)
class Part:
    """What a stream takes of a file: documents ``kept`` (int64, indices), each ``share`` times an epoch.

    ``samples`` and ``dropped`` are the Corpus's counts, as far as they fall to this part.
    """

    corpus: Corpus
    kept: Tensor
    share: float
    samples: int
    dropped: Mapping[str, tuple[int, int]]

    @staticmethod
    def whole(corpus: Corpus, share: float) -> Part:
        return Part(corpus, torch.arange(len(corpus)), share, corpus.n_samples, corpus.dropped)

    def fitting(self, tokens: int) -> Part:
        """Without the documents that are longer than a row of `tokens`, which count as dropped."""
        lengths = self.corpus.bounds.diff()[self.kept]
        too_long = lengths > tokens
        if not too_long.any():
            return self
        dropped = {**self.dropped, _longer(tokens): (int(too_long.sum()), int(lengths[too_long].sum()))}
        return replace(self, kept=self.kept[~too_long], dropped=dropped)


def source_of(part: Part, pieces: Pieces, unseen: Sequence[int], epochs: int) -> Source:
    """The account of one file; `unseen` are places in ``part.kept`` of documents that none of the `epochs` draws."""
    corpus, reasons = part.corpus, dict(part.dropped)
    seen = torch.ones(part.kept.numel(), dtype=torch.bool)
    seen[list(unseen)] = False
    lengths = corpus.bounds.diff()[part.kept]
    packed = seen.repeat_interleave(pieces.first.diff())
    in_pieces = int((pieces.ends - pieces.starts)[packed].sum())
    trained = int(pieces.trained[packed].sum())
    if len(unseen):
        reason = f"not drawn in {epochs} epoch{'s' * (epochs > 1)}, as the share {part.share:g} says"
        reasons[reason] = (len(unseen), int(lengths[~seen].sum()))
    dropped = sum(tokens for _, tokens in reasons.values())
    return Source(path=corpus.path, share=part.share, samples=part.samples, documents=int(seen.sum()),
                  pieces=int(packed.sum()), tokens=int(lengths.sum()) + sum(n for _, n in part.dropped.values()),
                  trained=trained, masked=in_pieces - trained, truncated=int(lengths[seen].sum()) - in_pieces,
                  dropped=dropped, reasons=reasons)


def notes_of(parts: Sequence[Part], pieces: Sequence[Pieces], sources: Sequence[Source], tokens: int,
             long: str) -> tuple[Note, ...]:
    """What is said before step 1, with the first line numbers of each."""
    found: dict[str, list[tuple[Part, Tensor]]] = {}
    lost = sum(each.lost for each in pieces)
    for part, cuts in zip(parts, pieces, strict=True):
        corpus = part.corpus
        trained = torch.zeros(len(corpus), dtype=torch.int64).index_add(0, cuts.owners, cuts.trained)[part.kept]
        flags = corpus.flags[part.kept]
        whole = corpus.n_trained[part.kept] > 0
        for text, where in (
                ("nothing in them is trained: all labels are masked; remove them, or give an answer weight 1",
                 trained == 0),
                ("their answer is blank, so they teach to say nothing", flags & BLANK != 0),
                ("do not end with an answer, so what is said last teaches nothing", flags & OPEN != 0),
                ("hold U+FFFD or a null character: text that was damaged, or read in a wrong encoding",
                 flags & SPOILT != 0),
                ("no end-of-text token is trained, so they do not teach to stop", whole & (flags & ENDS == 0))):
            found.setdefault(text, []).append((part, part.kept[where]))
        if len(cuts.long):
            text = (f"{_longer(tokens)}: split, no piece sees the one before it, and {lost:,} targets are "
                    "masked, since they became the first token of a piece" if long == "split" else
                    f"{_longer(tokens)}: cut there, the rest and its end-of-text token are lost")
            found.setdefault(text, []).append((part, cuts.long))
    found["the same tokens as a sample before them"] = _repeated(parts)
    notes = [Note(text, count, _places(hits)) for text, hits in found.items()
             if (count := sum(len(indices) for _, indices in hits))]
    for part, source in zip(parts, sources, strict=True):
        for reason, (n_samples, n_tokens) in source.reasons.items():
            longer = part.corpus.bounds.diff() > tokens if reason == _longer(tokens) else torch.zeros(0)
            notes.append(Note(f"{reason} ({n_tokens:,} tokens of {source.path} are dropped)", n_samples,
                              _places([(part, longer.nonzero().flatten())])))
    return tuple(notes)


def overlap(train: Sequence[Part], valid: Sequence[Part]) -> Note | None:
    """The note on samples of `valid` that are trained on as well, of pairs those whose prompt is; None if there are
    none."""
    known = torch.cat([part.corpus.kept_together()[part.kept] for part in train])
    hits = [(part, part.kept[torch.isin(part.corpus.kept_together()[part.kept], known)]) for part in valid]
    count = sum(len(indices) for _, indices in hits)
    pairs = any(bool(part.corpus.rejected_at.any()) for part in valid)
    text = f"held out, but {'answers to their prompts are ' if pairs else ''}trained on as well"
    return Note(text, count, _places(hits)) if count else None


def _repeated(parts: Sequence[Part]) -> list[tuple[Part, Tensor]]:
    """Of each part the documents that stood before, in it or in a part before it."""
    digests = torch.cat([part.corpus.digests[part.kept] for part in parts])
    ordered, order = digests.sort(stable=True)
    later = torch.zeros(len(digests), dtype=torch.bool)
    later[order[1:][ordered[1:] == ordered[:-1]]] = True
    sides = later.split([part.kept.numel() for part in parts])
    return [(part, part.kept[side]) for part, side in zip(parts, sides, strict=True)]


def _places(hits: Iterable[tuple[Part, Tensor]]) -> tuple[str, ...]:
    named = [part.corpus.where(index) for part, indices in hits for index in indices[:PLACES].tolist()]
    return tuple(named[:PLACES])


__all__ = ["Part", "notes_of", "overlap", "source_of"]
