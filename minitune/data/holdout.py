"""Held-out samples: a validation file, or a split of the training data in which no sample is on both sides."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minitune.config import Data
from minitune.data.account import Part, overlap
from minitune.data.read import Progress
from minitune.data.stream import Stream, stream
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


def split_off(whole: Stream, amount: float) -> tuple[Stream, Stream]:
    """(the stream without the held-out samples, the stream of them): `amount` below 1 is a share, else a number.

    Whole samples are held out, drawn by the stream's seed from all files together; samples with the same tokens stay on
    one side. The held-out stream has one epoch, unshuffled, each sample once. The two ledgers add up to the whole one's
    tokens; what is dropped counts on the side of training. Raises InputError if either side would be empty.
    """
    digests = [part.corpus.digests[part.kept].tolist() for part in whole.parts]
    total = sum(map(len, digests))
    wanted = max(1, round(amount * total)) if amount < 1 else int(amount)
    counts = Counter(digest for side in digests for digest in side)
    order = list(counts)
    random.Random(f"{whole.seed}:valid").shuffle(order)
    chosen: list[int] = []
    left = wanted
    for digest in order:
        if counts[digest] <= left:
            chosen.append(digest)
            left -= counts[digest]
    if wanted >= total or not chosen:
        raise InputError(f"data: valid_split is {amount:g}; {wanted:,} of {total:,} samples "
                         f"({len(counts):,} different ones) cannot be held out and leave some to train on")
    held = torch.tensor(chosen, dtype=torch.int64)
    train, valid = [], []
    for part in whole.parts:
        out = torch.isin(part.corpus.digests[part.kept], held)
        train.append(replace(part, kept=part.kept[~out], samples=part.samples - int(out.sum())))
        valid.append(Part(part.corpus, part.kept[out], 1.0, int(out.sum()), {}))
    return (Stream(train, whole.tokens, epochs=whole.epochs, seed=whole.seed, shuffle=whole.shuffle, long=whole.long),
            Stream(valid, whole.tokens, seed=whole.seed, shuffle=False, long=whole.long))


def streams(path: str | Path, tokenizer: Tokenizer, settings: Data, *, tokens: int, epochs: int = 1, seed: int = 0,
            progress: Progress | None = None) -> tuple[Stream, Stream | None]:
    """The training stream of a file under `settings`, and the validation stream if they ask for one.

    Raises InputError where nothing of the training data is trained, besides all that `stream` refuses.
    """
    train = stream(settings.shares(path), tokenizer, tokens=tokens, epochs=epochs, seed=seed,
                   field_map=settings.fields(), long=settings.long, cache=settings.cached, progress=progress)
    if not any(part.corpus.n_trained.any() for part in train.parts):
        first = next(part.corpus.where(0) for part in train.parts if len(part.corpus))
        raise InputError(f"{first}: nothing is trained here, nor in any other sample: all answers have weight 0, or no "
                         "segment is trainable; give what is to be learned weight 1 (trainable: true)")
    return hold_out(train, tokenizer, settings, progress)


def hold_out(train: Stream, tokenizer: Tokenizer, settings: Data,
             progress: Progress | None = None) -> tuple[Stream, Stream | None]:
    """(what of `train` is trained on, the validation stream that `settings` ask for, or None).

    The ledger of a validation file notes how many of its samples are trained on as well.
    """
    if settings.valid_split:
        return split_off(train, settings.valid_split)
    if settings.valid is None:
        return train, None
    valid = stream(settings.valid, tokenizer, tokens=train.tokens, seed=train.seed, shuffle=False,
                   field_map=settings.fields(), long=settings.long, cache=settings.cached, progress=progress)
    note = overlap(train.parts, valid.parts)
    if note is not None:
        valid.ledger = replace(valid.ledger, notes=(note, *valid.ledger.notes))
    return train, valid


__all__ = ["hold_out", "split_off", "streams"]
