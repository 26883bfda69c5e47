"""Pieces: what is packed of a file's documents, when some are longer than a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config import Long
from minitune.data.corpus import Corpus
from minitune.data.packing import too_long


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of k documents, m >= k of them, end to end: int64 starts [m], ends [m] in the file's tokens.

    ``owners`` int64 [m]: whose they are, an index into the Corpus. ``first`` int64 [k + 1]: document i's pieces are
    first[i] … first[i + 1] - 1. ``long`` int64: the documents that were too long. ``trained`` int64 [m]: targets.
    ``lost``: targets that became the first token of a piece and so are none.
    """

    owners: Tensor
    starts: Tensor
    ends: Tensor
    first: Tensor
    long: Tensor
    trained: Tensor
    lost: int


def cut(corpus: Corpus, kept: Tensor, tokens: int, long: Long) -> Pieces:
    """The pieces of documents `kept` (int64 [k], indices into `corpus`) for rows of `tokens`.

    A document that fits is one piece. A longer one is refused (InputError that names the first such sample); or split
    into pieces of exactly `tokens` and a last one with the rest, which do not see each other, and the first token of
    each has no predecessor, so it is never a target; or truncated to its first `tokens`. Those to be dropped are in
    `kept` no more.
    """
    lengths = corpus.bounds.diff()[kept]
    too_many = lengths > tokens
    if long == "refuse" and too_many.any():
        at = int(too_many.nonzero()[0])
        raise too_long(corpus.where(int(kept[at])), int(lengths[at]), tokens, int(lengths.max()),
                       "drop it (--long drop on the command line, long= in Python): a pair, both answers with their "
                       "prompt, is trained whole" if corpus.rejected_at.any() else
                       "say what to do with long ones: split, truncate or drop (--long on the command line, long= in "
                       "Python)")
    counts = -(-lengths // tokens) if long == "split" else torch.ones_like(lengths)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owners = kept.repeat_interleave(counts)
    skipped = (torch.arange(owners.numel()) - first[:-1].repeat_interleave(counts)) * tokens
    starts = corpus.bounds[owners] + skipped
    ends = torch.minimum(starts + tokens, corpus.bounds[owners + 1])
    trained = corpus.n_trained[owners].long()
    lost = 0
    for piece in too_many.repeat_interleave(counts).nonzero().flatten().tolist():
        start, end = int(starts[piece]), int(ends[piece])
        trained[piece] = corpus.trained[start + 1:end].sum()
        lost += int(corpus.trained[start])
    return Pieces(owners, starts, ends, first, kept[too_many], trained, lost)


__all__ = ["Pieces", "cut"]
