"""Held-out samples: a validation file, or a split of the training data in which no sample is on both sides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minitune.config import Data
from minitune.data.account import Part, overlap
from minitune.data.read import Progress
from minitune.data.stream import Stream, read_parts, stream
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


def split_off(whole: Stream, amount: float) -> tuple[Stream, Stream]:
    """(the stream without the held-out samples, the stream of them): `amount` below 1 is a share, else a number.

    Whole samples are held out, drawn by the stream's seed from all files together; samples with the same tokens, and
    pairs of answers to the same prompt, stay on one side. The held-out stream has one epoch, unshuffled, each sample
    once. The two ledgers add up to the whole one's tokens; what is dropped counts on the side of training. Raises
    InputError if either side would be empty.
    """
    together = [part.corpus.kept_together()[part.kept] for part in whole.parts]
    digests = [each.tolist() for each in together]
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
    for part, each in zip(whole.parts, together, strict=True):
        out = torch.isin(each, held)
        train.append(replace(part, kept=part.kept[~out], samples=part.samples - int(out.sum())))
        valid.append(Part(part.corpus, part.kept[out], 1.0, int(out.sum()), {}))
    return (Stream(train, whole.tokens, epochs=whole.epochs, seed=whole.seed, shuffle=whole.shuffle, long=whole.long),
            Stream(valid, whole.tokens, seed=whole.seed, shuffle=False, long=whole.long))


def streams(path: str | Path, tokenizer: Tokenizer, settings: Data, *, tokens: int, epochs: int = 1, seed: int = 0,
            progress: Progress | None = None, pairs: bool = False) -> tuple[Stream, Stream | None]:
    """The training stream of a file under `settings`, and the validation stream if they ask for one; of `pairs` both.

    Raises InputError where nothing of the training data is trained, or of the validation data, besides all that
    `stream` refuses.
    """
    train = stream(settings.shares(path), tokenizer, tokens=tokens, epochs=epochs, seed=seed,
                   field_map=settings.fields(), long=settings.long, cache=settings.cached, progress=progress,
                   pairs=pairs)
    if not any(part.corpus.n_trained.any() for part in train.parts):
        first = next(part.corpus.where(0) for part in train.parts if len(part.corpus))
        raise InputError(f"{first}: nothing is trained here, nor in any other sample: all answers have weight 0, or no "
                         "segment is trainable; give what is to be learned weight 1 (trainable: true)")
    train, valid = hold_out(train, settings, read_valid(settings, tokenizer, progress, pairs))
    _check_trained(train, "to train on")
    if valid is not None:
        _check_trained(valid, "to measure the validation loss on")
    return train, valid


def read_valid(settings: Data, tokenizer: Tokenizer, progress: Progress | None = None,
               pairs: bool = False) -> list[Part] | None:
    """The validation file that `settings` name, encoded; None where they name none."""
    if settings.valid is None:
        return None
    return read_parts(settings.valid, tokenizer, settings.fields(), settings.cached, progress, pairs)


def hold_out(train: Stream, settings: Data, held: Sequence[Part] | None) -> tuple[Stream, Stream | None]:
    """(what of `train` is trained on, the validation stream that `settings` ask for, or None). `held`: `read_valid`'s.

    The ledger of a validation file notes how many of its samples are trained on as well.
    """
    if settings.valid_split:
        return split_off(train, settings.valid_split)
    if held is None:
        return train, None
    valid = Stream(held, train.tokens, seed=train.seed, shuffle=False, long=settings.long)
    note = overlap(train.parts, valid.parts)
    if note is not None:
        valid.ledger = replace(valid.ledger, notes=(note, *valid.ledger.notes))
    return train, valid


def _check_trained(stream: Stream, use: str) -> None:
    """InputError if no epoch of `stream` has a trained token, though its files may have some."""
    sources = stream.ledger.sources
    if any(source.trained for source in sources):
        return
    names = ", ".join(source.path for source in sources)
    if not any(source.documents for source in sources):
        raise InputError(f"{names}: the shares draw no sample in {stream.epochs} epoch{'s' * (stream.epochs > 1)}, so "
                         f"there is nothing {use}; raise them")
    cuts = stream.long in ("split", "truncate")
    if cuts and any(bool(part.corpus.n_trained[part.kept].any()) for part in stream.parts):
        raise InputError(f"{names}: long is {stream.long}, and what would be trained is cut off or lost at "
                         f"{stream.tokens:,} tokens, or not drawn, so there is nothing {use}; raise tokens")
    raise InputError(f"{names}: no sample that is drawn has anything trained, so there is nothing {use}; give what is "
                     "to be learned weight 1, or hold out other samples")


__all__ = ["hold_out", "read_valid", "split_off", "streams"]
