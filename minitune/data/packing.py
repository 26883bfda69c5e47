"""Packing: whole documents by best fit into rows of T tokens, and each row as one Batch."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import check_whole, short
from minitune.data.batch import IGNORED, Batch
from minitune.data.document import Document
from minitune.errors import InputError
from minitune.model.memory import free_bytes

FILLER_ID = 0
"""The token of a row's filler document. It is never trained and nothing attends to it from outside."""
TOKEN_BYTES = 33
"""Host memory for each token of a row while its Batch is made, as measured."""


def best_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's lengths adding up to at most `tokens`: best fit.

    Documents longer than tokens / 8 come first, the longest at the head, since they are what leaves room over; the
    others follow in the given order. (All of them by length would leave no more room over, but fill whole rows, and so
    whole steps, with documents of one length: far from a random sample.) Each goes into the fullest row with room for
    it, the youngest of those that are equally full. Time and memory depend on the documents alone, whatever `tokens`
    is: O(n log n), and a sorted list of the different amounts of room. Every length must be between 1 and `tokens`.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}    # free tokens -> the rows with exactly so many
    rooms: list[int] = []                   # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i] if 8 * lengths[i] > tokens else 0):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            free = rooms[place]
            row = with_room[free].pop()
            if not with_room[free]:
                del with_room[free], rooms[place]
            rows[row].append(index)
        else:
            free, row = tokens, len(rows)
            rows.append([index])
        left = free - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows


def pack(documents: Iterable[Document | Sequence[Any] | Tensor], tokens: int) -> list[Batch]:
    """Packs whole documents into Batches of exactly `tokens` positions each; what is left over is one filler document.

    A document is a Document, or ids (all trained), or a pair (ids, labels) with labels as in Batch: already shifted,
    ``labels[t]`` is ``ids[t + 1]`` or -100. Documents with nothing trained are packed as they are. If any document has
    a weight, all batches have weights. Raises InputError for an empty document and for one longer than `tokens`.
    """
    if isinstance(documents, str) or not isinstance(documents, Iterable):
        raise InputError(f"pack: documents is {short(documents)}; give a list of documents or of lists of token ids")
    found = [_as_document(document, f"documents[{place}]") for place, document in enumerate(documents)]
    check_row(tokens)
    for place, document in enumerate(found):
        if len(document) > tokens:
            raise too_long(document.where or f"documents[{place}]", len(document), tokens, max(map(len, found)),
                           "split it")
    weighted = any(document.weight is not None for document in found)
    return [make_batch([_piece(found[index]) for index in row], tokens, weighted, row)
            for row in best_fit([len(document) for document in found], tokens)]


def check_row(tokens: int) -> None:
    """InputError if `tokens` is no row length, or more than fits into memory."""
    check_whole("packing", "tokens", tokens)
    needed, free = TOKEN_BYTES * tokens, free_bytes(torch.device("cpu"))
    if needed > free:       # a system that lends more memory than it has would end the process without a word
        raise InputError(f"packing: tokens is {tokens}; a row of so many takes {needed / 1e9:,.1f} GB of memory, and "
                         f"{free / 1e9:,.1f} GB are free; lower tokens")


def too_long(where: str, length: int, tokens: int, longest: int, advice: str) -> InputError:
    """The error for a document that does not fit into a row; `advice` is what else than more tokens would help."""
    return InputError(f"{where}: {length:,} tokens do not fit into a row of {tokens:,}; raise tokens (the longest "
                      f"document has {longest:,}), or {advice}")


Piece = tuple[memoryview, memoryview, float | None, int]
"""What is packed: the memory of ids int32 [n] and of trained int8 [n] (not 0: a target; the first never is one), the
weight or None, and of a pair where its second document begins, else 0. A data set has very many short ones, and a slice
of memory is made in a tenth of a tensor's time."""


def make_batch(pieces: Iterable[Piece], tokens: int, weighted: bool = False, numbers: Sequence[int] = ()) -> Batch:
    """The Batch of pieces that together have at most `tokens` tokens, with a filler document behind them. A pair is two
    of its documents, one behind the other.

    ``weighted`` gives it weights [T] (1 where a piece has none), else None. `numbers`: which pieces they are.
    """
    found = list(pieces)
    lengths, owners = _documents(found)
    filled = sum(lengths)
    rest = tokens - filled
    ids = torch.full((tokens,), FILLER_ID, dtype=torch.int64)
    ids[:filled] = torch.frombuffer(bytearray().join([piece[0] for piece in found]), dtype=torch.int32)
    target = torch.zeros(tokens, dtype=torch.bool)
    target[:filled] = torch.frombuffer(bytearray().join([piece[1] for piece in found]), dtype=torch.int8)
    bounds = torch.tensor(list(accumulate([*lengths, rest] if rest else lengths, initial=0)))
    target[bounds[:-1]] = False
    labels = torch.where(target, ids, IGNORED).roll(-1)
    weights = None
    if weighted:
        given = [1.0 if found[owner][2] is None else found[owner][2] for owner in owners]
        each = torch.tensor(given + [1.0] * (rest > 0), dtype=torch.float32)
        weights = each.repeat_interleave(bounds.diff())
    return Batch(tokens=ids, labels=labels, cu_seqlens=bounds.int(), weights=weights, n_filler=rest,
                 pieces=tuple(numbers[owner] for owner in owners) if numbers else ())


def _documents(pieces: Sequence[Piece]) -> tuple[list[int], Sequence[int]]:
    """(how long each document is, whose it is: a place in `pieces`)."""
    if not any(second for _, _, _, second in pieces):
        return [trained.nbytes for _, trained, _, _ in pieces], range(len(pieces))
    lengths, owners = [], []
    for owner, (_, trained, _, second) in enumerate(pieces):
        own = [second, trained.nbytes - second] if second else [trained.nbytes]
        lengths += own
        owners += [owner] * len(own)
    return lengths, owners


def _piece(document: Document) -> Piece:
    ids, trained = memoryview(document.ids), memoryview(document.trained)       # type: ignore[arg-type]
    return ids, trained, document.weight, document.rejected_at


def _as_document(value: Document | Sequence[Any] | Tensor, where: str) -> Document:
    if isinstance(value, Document):
        return value
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], int):
        ids, labels = _integers(value[0], where), _integers(value[1], where)
        if len(ids) != len(labels):
            raise InputError(f"{where}: has {len(ids)} ids but {len(labels)} labels; they must be equally many")
        for place, label in enumerate(labels):
            if label != IGNORED and (place + 1 == len(ids) or label != ids[place + 1]):
                following = ids[place + 1] if place + 1 < len(ids) else "(there is none)"
                raise InputError(f"{where}: label {place} is {label}; labels are already shifted, so it must be the "
                                 f"next token, {following}, or {IGNORED}")
        return Document(ids, [0, *(label != IGNORED for label in labels[:-1])][:len(ids)], where=where)
    ids = _integers(value, where)
    return Document(ids, [1] * len(ids), where=where)


def _integers(value: Any, where: str) -> array[int]:
    """`value` (a sequence of integers or an integer tensor [n]) as int64."""
    try:
        return array("q", value.tolist() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: must be a Document, token ids, or a pair (ids, labels) ({error})") from error


__all__ = ["Piece", "best_fit", "check_row", "make_batch", "pack", "too_long"]
