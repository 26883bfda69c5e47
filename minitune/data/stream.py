"""stream: data files as packed Batches, shuffled and packed anew in every epoch, repeatable by seed."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from minitune.arguments import answers_names, check_seed, check_whole, short
from minitune.config import Long, check_share
from minitune.data.account import Part, notes_of, source_of
from minitune.data.batch import Batch
from minitune.data.corpus import raw
from minitune.data.document import Document
from minitune.data.ledger import Epoch, Ledger
from minitune.data.packing import Piece, best_fit, check_row, make_batch
from minitune.data.pieces import cut
from minitune.data.read import Progress, corpus_of, read_corpus
from minitune.data.samples import are_samples, how_to_give
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


class Stream:
    """The batches of a data set. Iterating gives those of all epochs, ``len`` of them; each iteration begins anew, and
    `next` draws from one iteration that the stream itself keeps. Epochs are packed anew, so one may have a batch more
    than another.

    Documents, or pieces of long ones, in which nothing is trained are left out: so each batch trains something.

    ``ledger`` tells where every token went (`minitune.data.ledger`). Of epoch 0: ``n_documents``, ``n_tokens`` (the
    packed documents' own), ``n_trained`` (targets among them), ``n_masked``, ``n_filler``: n_trained + n_masked +
    n_filler = count(1) · tokens. ``parts`` are the files that it draws from. ``pairs``: each document is a pair of
    answers, the chosen and the rejected one, which a batch holds as two, one behind the other.
    """

    def __init__(self, parts: Sequence[Part], tokens: int, *, epochs: int = 1, seed: int = 0, shuffle: bool = True,
                 long: Long = "refuse") -> None:
        check_whole("stream", "epochs", epochs)
        check_seed("stream", seed)
        check_row(tokens)
        if long not in get_args(Long):
            raise InputError(f"stream: long is {short(long)}; it must be one of {', '.join(get_args(Long))}")
        if long == "drop":
            parts = _fitting(parts, tokens)
        self.parts, self.tokens, self.long = tuple(parts), tokens, long
        self.pairs = any(bool(part.corpus.rejected_at.any()) for part in parts)
        self.epochs, self.seed, self.shuffle = epochs, seed, shuffle
        if self.pairs and long in ("split", "truncate"):
            raise InputError(f"stream: long is {long}, and a pair, both answers with their prompt, is trained whole; "
                             "refuse those that are too long, or drop them")
        self._pieces = [cut(part.corpus, part.kept, tokens, long) for part in parts]
        # Of each piece its length, its start in its file, its document there, its file.
        self._lengths = array("q", torch.cat([each.ends - each.starts for each in self._pieces]).tolist())
        self._starts = array("q", torch.cat([each.starts for each in self._pieces]).tolist())
        self._owners = array("q", torch.cat([each.owners for each in self._pieces]).tolist())
        self._files = array("i", (place for place, each in enumerate(self._pieces) for _ in range(len(each.owners))))
        self._weighted = any(bool((~part.corpus.weights[part.kept].isnan()).any()) for part in parts)
        # Pieces without a target, which teach nothing and which no other sees: they are packed nowhere.
        self._idle = set((torch.cat([each.trained for each in self._pieces]) == 0).nonzero().flatten().tolist())
        self._counts: list[int] = []        # batches of each epoch, as far as they were asked for
        self._first: list[list[int]] | None = None      # the rows of epoch 0, until they are asked for
        self._cursor: Iterator[Batch] | None = None
        self._account()

    def _account(self) -> None:
        drawn = [self._drawn(place, 0) for place in range(len(self.parts))]
        trained = torch.cat([each.trained for each in self._pieces])
        order = self._order(0)
        self.n_documents, self.n_tokens = sum(map(len, drawn)), sum(self._lengths[index] for index in order)
        self.n_trained = int(trained[order].sum())
        self.n_masked = self.n_tokens - self.n_trained
        batches = self.count(1)
        self.n_filler = batches * self.tokens - self.n_tokens
        sources = tuple(source_of(part, pieces, self._unseen(place), self.epochs)
                        for place, (part, pieces) in enumerate(zip(self.parts, self._pieces, strict=True)))
        epoch = Epoch(samples=self.n_documents, batches=batches, row=self.tokens, trained=self.n_trained,
                      masked=self.n_masked, filler=self.n_filler)
        notes = notes_of(self.parts, self._pieces, sources, self.tokens, self.long)
        self.ledger = Ledger(sources=sources, epoch=epoch, epochs=self.epochs, notes=notes)
        self.ledger.check()

    @property
    def documents(self) -> list[Document]:
        """What is packed, in the files' order: each document, or its pieces where it is too long for a row."""
        return [self.document(index) for index in range(self.n_pieces)]

    @property
    def n_pieces(self) -> int:
        """How many `documents` there are."""
        return len(self._lengths)

    def document(self, index: int) -> Document:
        """One of `documents`."""
        start, corpus = self._starts[index], self.parts[self._files[index]].corpus
        return corpus.document(self._owners[index], start, start + self._lengths[index])

    def where(self, index: int) -> str:
        """The file and line, or the sample, that one of `documents` comes from."""
        return self.document(index).where

    def __len__(self) -> int:
        return self.count(self.epochs)

    def count(self, epochs: int) -> int:
        """The number of batches in the first `epochs` epochs."""
        while len(self._counts) < epochs:
            rows = self._rows(len(self._counts))
            if not self._counts:
                self._first = rows
            self._counts.append(len(rows))
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
        (seed, epoch) alone; without ``shuffle`` documents of a row and rows keep the files' order where packing lets
        them."""
        memory = [(raw(part.corpus.ids), raw(part.corpus.trained)) for part in self.parts]

        def piece(index: int) -> Piece:
            start, place = self._starts[index], self._files[index]
            end = start + self._lengths[index]
            ids, trained = memory[place]
            corpus, owner = self.parts[place].corpus, self._owners[index]
            weight = corpus.weight(owner) if self._weighted else None
            second = int(corpus.rejected_at[owner]) if self.pairs else 0
            return ids[4 * start:4 * end], trained[start:end], weight, second

        for row in self._rows(epoch):
            yield make_batch(map(piece, row), self.tokens, self._weighted, row)

    def _rows(self, epoch: int) -> list[list[int]]:
        """Which pieces stand in each batch of an epoch."""
        if epoch == 0:
            first, self._first = self._first, None      # one read, one write: two threads may begin an epoch
            if first is not None:       # packed when its batches were counted
                return first
        order = self._order(epoch)
        shuffler = random.Random(f"{self.seed}:{epoch}") if self.shuffle else None
        if shuffler:
            shuffler.shuffle(order)
        rows = [[order[place] for place in row]
                for row in best_fit([self._lengths[index] for index in order], self.tokens)]
        if shuffler:
            for row in rows:
                shuffler.shuffle(row)
            shuffler.shuffle(rows)
            return rows
        return sorted(sorted(row) for row in rows)

    def _order(self, epoch: int) -> list[int]:
        """The pieces of an epoch with something to train, in the files' order."""
        order: list[int] = []
        base = 0        # pieces of the files before
        for place, pieces in enumerate(self._pieces):
            first = pieces.first.tolist()
            for index in self._drawn(place, epoch):
                order += range(base + first[index], base + first[index + 1])
            base += len(pieces.owners)
        return [index for index in order if index not in self._idle] if self._idle else order

    def _drawn(self, place: int, epoch: int) -> Sequence[int]:
        """The documents (places in ``kept``) of file `place` in an epoch, sorted.

        All epochs draw from one endless series of passes over the file, each pass in an order of its own, and an epoch
        takes the next share · n of it: so none is seen a second time before all were seen once.
        """
        part = self.parts[place]
        n = part.kept.numel()
        start, end = (floor(part.share * n * (epoch + more) + 0.5) for more in (0, 1))
        if n == 0 or (start % n == 0 and end - start == n):
            return range(n)
        drawn: list[int] = []
        for number in range(start // n, -(-end // n)):
            drawn += self._pass(place, number)[max(0, start - number * n):end - number * n]
        return sorted(drawn)

    def _pass(self, place: int, number: int) -> list[int]:
        order = list(range(self.parts[place].kept.numel()))
        if self.shuffle:
            random.Random(f"{self.seed}:{place}:{number}").shuffle(order)
        return order

    def _unseen(self, place: int) -> list[int]:
        """The documents of file `place` that none of the epochs draws."""
        part = self.parts[place]
        drawn = floor(part.share * part.kept.numel() * self.epochs + 0.5)
        return self._pass(place, 0)[drawn:] if drawn < part.kept.numel() else []

    def __repr__(self) -> str:
        return (f"Stream({self.n_documents:,} documents, {self.n_tokens:,} tokens, {self.n_trained:,} trained, "
                f"{len(self)} batches of {self.tokens:,} in {self.epochs} epochs)")


@answers_names
def stream(path: str | Path | Sequence[Any] | Mapping[Any, float], tokenizer: Tokenizer, *, tokens: int,
           epochs: int = 1, seed: int = 0, shuffle: bool = True, field_map: Mapping[str, str] | None = None,
           long: Long = "refuse", cache: bool | None = None, progress: Progress | None = None,
           pairs: bool = False) -> Stream:
    """Reads and encodes data files (formats: `minitune.data.formats`) and gives their packed batches.

    `path`: a file, a list of files, or {file: share}, where share is how often each of its samples is seen in an epoch:
    1 once, 2 twice, 0.5 one half of them in the first epoch and the other in the second, drawn by seed. Or the samples
    themselves, as a list of dicts (or a table such as a datasets.Dataset), each what a line of such a file would be.
    Each Batch has exactly `tokens` positions. `long`: what is done with a sample that has more: "refuse", "split" into
    pieces that do not see each other, "truncate" or "drop". `field_map`: {our field: your field}. `cache`: see
    `minitune.data.cache`; None caches files above 1 MB, False none. `progress`(file, samples, tokens) is called now and
    then while a file is encoded. `pairs`: of preferences both answers, for objective="dpo"; without it the chosen one.

    The encoded data set takes 5 bytes a token of host memory, or of the page cache where it comes from the cache. While
    a file is encoded, Python's search for cyclic garbage rests in the whole process, and its threads take turns sooner.
    Raises InputError that names file:line for a bad sample and, if so asked, for one longer than `tokens`.
    """
    if not hasattr(tokenizer, "encode_many"):
        raise InputError(f"stream: tokenizer is {short(tokenizer)}; give model.tokenizer, or "
                         "mt.data.load_tokenizer(folder)")
    if field_map is not None and not isinstance(field_map, Mapping):
        raise InputError(f"stream: field_map is {short(field_map)}; give {{our field: your field}}, such as "
                         '{"prompt": "question"}')
    check_whole("stream", "tokens", tokens, low=2)      # the last token of a row is never trained
    if not isinstance(pairs, bool):
        raise InputError(f"stream: pairs is {short(pairs)}; it must be True or False")
    return Stream(read_parts(path, tokenizer, field_map, cache, progress, pairs), tokens, epochs=epochs, seed=seed,
                  shuffle=shuffle, long=long)


def read_parts(path: Any, tokenizer: Tokenizer, field_map: Mapping[str, str] | None = None, cache: bool | None = None,
               progress: Progress | None = None, pairs: bool = False) -> list[Part]:
    """The files of a stream, encoded; arguments as those of `stream`. InputError if none has a sample to train on."""
    parts = [Part.whole(corpus_of(path, tokenizer, field_map, progress, pairs), 1.0)] if are_samples(path) else [
        Part.whole(read_corpus(name, tokenizer, field_map, cache, progress, pairs), share)
        for name, share in _files(path).items()]
    if not any(len(part.corpus) for part in parts):
        corpus = parts[0].corpus
        why = "; ".join(f"{reason}: {n_samples:,}" for reason, (n_samples, _) in corpus.dropped.items())
        raise InputError(f"{corpus.path}: none of its samples is used{f' ({why})' if why else ''}, so there is nothing "
                         "to train on")
    return parts


def _fitting(parts: Sequence[Part], tokens: int) -> list[Part]:
    """`parts` without what is longer than a row of `tokens`. InputError where nothing is left."""
    left = [part.fitting(tokens) for part in parts]
    if any(part.kept.numel() for part in parts) and not any(part.kept.numel() for part in left):
        lengths = torch.cat([part.corpus.bounds.diff()[part.kept] for part in parts])
        raise InputError(f"{', '.join(part.corpus.path for part in parts)}: every sample is longer than {tokens:,} "
                         f"tokens, so none is left; raise tokens (the shortest has {int(lengths.min()):,}, the longest "
                         f"{int(lengths.max()):,})")
    return left


def _files(path: Any) -> dict[str, float]:
    """{file: share} of what `stream` takes as its path."""
    if advice := how_to_give(path):
        raise InputError(f"stream: path is {short(path)}; {advice}")
    if isinstance(path, str | os.PathLike):
        path = [path]
    items = list(path.items()) if isinstance(path, Mapping) else (
        [(each, 1) for each in path] if isinstance(path, Sequence) else [])
    if not items or not all(isinstance(name, str | os.PathLike) for name, _ in items):
        raise InputError(f"stream: path is {short(path)}; give the path of a data file, a list of them, "
                         "{path: share}, or samples as a list of dicts")
    if len(items) > 1 and not any(Path(name).suffix or os.path.exists(name) for name, _ in items):
        raise InputError(f"stream: path is {short(path)}, and none of these is a file; give texts as samples: "
                         '[{"text": "…"}, …]')
    found: dict[str, float] = {}
    for name, share in items:
        check_share("stream", name, share)
        if str(Path(name)) in found:
            raise InputError(f"stream: {name} is given twice; to see it twice in an epoch say {{path: 2}}")
        found[str(Path(name))] = float(share)
    return found


__all__ = ["Stream", "read_parts", "stream"]
