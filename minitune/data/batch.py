"""Batch: one packed micro-batch, flat, as every layer above and below the data pipeline sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.errors import InputError
from minitune.ops.documents import Documents

IGNORED = -100
"""The label of a position that is not trained."""
GRAIN = 64
"""Tokens. On a CPU the library makes a program for each shape of a product, and keeps it, which takes time and memory;
so the rows of a run should have few lengths."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Batch:
    """Documents end to end: int64 tokens [T], int64 labels [T], int32 cu_seqlens [n + 1], fp32 weights [T] or None.

    ``labels[t]`` is ``tokens[t + 1]`` of the same document, already shifted; -100 is not trained, and neither is the
    last position of a document. What the host knows it keeps as plain numbers, so that no device has to be asked:
    ``documents`` (lengths, longest), ``positions`` (int64 [T], restarting in each document), ``trained`` (int64
    [n_trained], the trained positions), ``n_trained``, ``longest_trained`` (of the documents in which
    something is trained: a row's filler is none), ``highest_token``. ``n_filler`` says how many of the last tokens are
    no data, only what packing left of a row; ``pieces`` which documents of a data set they are, where they come from
    one (`Stream.document`).

    Raises InputError for shapes or values that break this contract.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    weights: Tensor | None = None
    n_filler: int = 0
    pieces: tuple[int, ...] = ()
    documents: Documents = field(init=False, repr=False)
    positions: Tensor = field(init=False, repr=False)
    trained: Tensor = field(init=False, repr=False)
    n_trained: int = field(init=False)
    longest_trained: int = field(init=False)
    highest_token: int = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        documents = Documents.from_cu_seqlens(self.cu_seqlens)
        bounds = self.cu_seqlens.long()
        target = self.labels != IGNORED
        if target[bounds[1:] - 1].any():
            raise InputError("Batch: the last position of a document has no next token; its label must be -100")
        wrong = target & (self.labels != self.tokens.roll(-1))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise InputError(f"Batch: labels[{at}] is {int(self.labels[at])}; it must be the next token "
                             f"{int(self.tokens[at + 1])}, or -100 (labels are already shifted)")
        lowest, highest = (int(bound) for bound in self.tokens.aminmax())
        if lowest < 0:
            raise InputError(f"Batch: tokens holds {lowest}; ids are never negative")
        if self.weights is not None and not torch.isfinite(self.weights).all():
            raise InputError("Batch: weights holds values that are not finite")
        trained = target.nonzero().flatten()
        before = torch.searchsorted(trained, bounds).tolist()       # trained positions before each document
        starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=target.numel())
        derived = {"documents": documents, "positions": torch.arange(target.numel()) - starts, "trained": trained,
                   "n_trained": trained.numel(),
                   "longest_trained": max((length for length, (first, end) in zip(
                       documents.lengths, pairwise(before), strict=True) if first < end), default=0),
                   "highest_token": highest}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        tokens = self.tokens.numel() if isinstance(self.tokens, Tensor) else 0
        for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("cu_seqlens", torch.int32),
                            ("weights", torch.float32)):
            value = getattr(self, name)
            if value is None and name == "weights":
                continue
            if not isinstance(value, Tensor):
                raise InputError(f"Batch: {name} is {short(value)}; it must be a flat {dtype} tensor; "
                                 "mt.data.pack([ids, …], tokens=…) takes lists")
            if value.dim() != 1 or value.dtype != dtype or value.device.type != "cpu":
                raise InputError(f"Batch: {name} must be a flat {dtype} tensor on the host, not {value.dtype} "
                                 f"{list(value.shape)} on {value.device}; build it on the host, then call .to(device)")
            if name != "cu_seqlens" and value.numel() != tokens:
                raise InputError(f"Batch: {name} has {value.numel()} entries for {tokens} tokens")
        bounds = self.cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or any(a >= b for a, b in pairwise(bounds)):
            raise InputError(f"Batch: cu_seqlens must rise strictly from 0 to the {tokens} tokens, "
                             f"not {short(bounds)}")

    def __repr__(self) -> str:
        return (f"Batch({self.n_tokens:,} tokens in {len(self.lengths):,} documents, "
                f"{self.n_trained:,} trained, {self.n_filler:,} filler, on {self.tokens.device})")

    def trimmed(self) -> Batch:
        """Without most of its filler, for a CPU: losses and gradients stay what they are, the work for it goes. What is
        left is a multiple of GRAIN tokens, or all of them."""
        end = min(self.n_tokens, -(-(self.n_tokens - self.n_filler) // GRAIN) * GRAIN)
        left = self.n_filler - (self.n_tokens - end)
        if end == self.n_tokens:
            return self
        bounds = [*self.cu_seqlens[:-1].tolist(), *([end] if left else [])]
        return Batch(tokens=self.tokens[:end], labels=self.labels[:end],
                     cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
                     weights=None if self.weights is None else self.weights[:end], n_filler=left, pieces=self.pieces)

    def split(self, tokens: int) -> list[Batch]:
        """The same documents in the same order, in batches of at most so many tokens and without filler; a document
        that is longer has a batch of its own. Of a batch on the host."""
        groups: list[list[int]] = [[]]
        for length in self.lengths:
            if groups[-1] and sum(groups[-1]) + length > tokens:
                groups.append([])
            groups[-1].append(length)
        batches, start, first = [], 0, 0
        for group in groups:
            end, behind = start + sum(group), first + len(group)
            batches.append(Batch(tokens=self.tokens[start:end], labels=self.labels[start:end],
                                 cu_seqlens=torch.tensor([0, *accumulate(group)], dtype=torch.int32),
                                 weights=None if self.weights is None else self.weights[start:end],
                                 pieces=self.pieces[first:behind]))
            start, first = end, behind
        return batches

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; the copies from pinned memory do not block the host."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def on(self, device: torch.device) -> Batch:
        """A batch of the host as `device` computes it: a CPU without most of its filler, a GPU with a copy that the
        host does not wait for, through pinned memory."""
        if device.type == "cpu":
            return self.trimmed()
        return (self.pin_memory() if device.type == "cuda" and self.tokens.device.type == "cpu" else self).to(device)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        moved = object.__new__(Batch)
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            object.__setattr__(moved, name, change(value) if isinstance(value, Tensor) else value)
        object.__setattr__(moved, "documents", replace(self.documents, cu_seqlens=moved.cu_seqlens))
        return moved

    def pin_memory(self) -> Batch:
        """The same batch in pinned host memory, from where a copy to a GPU does not block the host."""
        return self._map(lambda value: value.pin_memory())

    @property
    def lengths(self) -> tuple[int, ...]:
        """How long its documents are, the filler left out."""
        return self.documents.lengths[:-1] if self.n_filler else self.documents.lengths

    @property
    def n_tokens(self) -> int:
        """T, filler included."""
        return self.tokens.numel()


__all__ = ["IGNORED", "Batch"]
