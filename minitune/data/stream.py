"""stream: a JSONL file as packed Batches, shuffled and packed anew in every epoch, repeatable by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minitune.config import check_seed, check_whole, short
from minitune.data.batch import Batch
from minitune.data.document import Document
from minitune.data.formats import read_documents
from minitune.data.packing import best_fit, check_lengths, make_batch
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


class Stream:
    """The batches of a data set. Iterating gives those of all epochs, ``len`` of them; each iteration begins anew, and
    `next` draws from one iteration that the stream itself keeps. Epochs are packed anew, so one may have a batch more
    than another.

    The ledger of one epoch: ``n_documents``, ``n_tokens`` (the documents' own), ``n_trained`` (targets among them),
    ``n_masked``, and ``n_filler`` in epoch 0: n_trained + n_masked + n_filler = count(1) · tokens.
    """

    def __init__(self, documents: list[Document], tokens: int, *, epochs: int = 1, seed: int = 0,
                 shuffle: bool = True) -> None:
        check_whole("stream", "epochs", epochs)
        check_seed("stream", seed)
        check_lengths(documents, tokens)
        self.documents = documents
        self.tokens, self.epochs, self.seed, self.shuffle = tokens, epochs, seed, shuffle
        self.n_documents = len(documents)
        self.n_tokens = sum(map(len, documents))
        self.n_trained = sum(document.n_trained for document in documents)
        self.n_masked = self.n_tokens - self.n_trained
        self._counts: list[int] = []        # batches of each epoch, as far as they were asked for
        self.n_filler = self.count(1) * tokens - self.n_tokens
        self._weighted = any(document.weight is not None for document in documents)
        self._cursor: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self.count(self.epochs)

    def count(self, epochs: int) -> int:
        """The number of batches in the first `epochs` epochs."""
        while len(self._counts) < epochs:
            self._counts.append(len(self._rows(len(self._counts))))
        return sum(self._counts[:epochs])

    def __iter__(self) -> Iterator[Batch]:
        for epoch in range(self.epochs):
            yield from self.epoch(epoch)

    def __next__(self) -> Batch:
        if self._cursor is None:
            self._cursor = iter(self)
        return next(self._cursor)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch (from 0). Documents are shuffled and packed, then the rows are shuffled, by
        (seed, epoch) alone; without ``shuffle`` documents of a row and rows keep the file's order where packing lets
        them."""
        for row in self._rows(epoch):
            yield make_batch([self.documents[index] for index in row], self.tokens, self._weighted)

    def _rows(self, epoch: int) -> list[list[int]]:
        """Which documents stand in each batch of an epoch."""
        order = list(range(self.n_documents))
        shuffler = random.Random(f"{self.seed}:{epoch}") if self.shuffle else None
        if shuffler:
            shuffler.shuffle(order)
        rows = [[order[place] for place in row]
                for row in best_fit([len(self.documents[index]) for index in order], self.tokens)]
        if shuffler:
            for row in rows:
                shuffler.shuffle(row)
            shuffler.shuffle(rows)
            return rows
        return sorted(sorted(row) for row in rows)

    def __repr__(self) -> str:
        return (f"Stream({self.n_documents:,} documents, {self.n_tokens:,} tokens, {self.n_trained:,} trained, "
                f"{len(self)} batches of {self.tokens:,} in {self.epochs} epochs)")


def stream(path: str | Path, tokenizer: Tokenizer, *, tokens: int, epochs: int = 1, seed: int = 0,
           shuffle: bool = True) -> Stream:
    """Reads and encodes a JSONL file (formats: `minitune.data.formats.to_segments`) and gives its packed batches.

    Each Batch has exactly `tokens` positions. The encoded data set is kept in host memory, 5 bytes a token. Raises
    InputError that names file:line for a bad sample and for one longer than `tokens`.
    """
    check_whole("stream", "tokens", tokens, low=2)      # the last token of a row is never trained
    if not isinstance(path, str | Path):
        raise InputError(f"stream: path is {short(path)}; give the path of a JSONL file")
    return Stream(list(read_documents(path, tokenizer)), tokens, epochs=epochs, seed=seed, shuffle=shuffle)


__all__ = ["Stream", "stream"]
