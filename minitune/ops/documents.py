"""Documents: where each document of a flat packed stream begins and ends, on the device and as plain host numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """cu_seqlens int32 [n + 1] on the device; ``lengths`` (n ints) on the host, so attention never asks the device.

    A document may be empty: a batch whose number of documents is fixed is padded with such. Where ``exact`` is False
    nobody may choose by the lengths, which need not be those on the device: they are only bounds.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    exact: bool = True

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor) -> Documents:
        """From a host tensor int32 [n + 1]."""
        return Documents(cu_seqlens, tuple(cu_seqlens.diff().tolist()))

    @staticmethod
    def from_lengths(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Documents:
        """From the documents' lengths in tokens."""
        bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Documents(bounds.to(device), tuple(lengths))

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def n_equal(self) -> int | None:
        """How many documents there are, if the host knows that all but the empty ones are equally long; else None."""
        lengths = [length for length in self.lengths if length]
        return len(lengths) if self.exact and len(set(lengths)) == 1 else None

    @functools.cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """(starts, ends), int32 [T] on the device: of each token its document's first token and its end."""
        tokens = torch.arange(self.n_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        following = torch.searchsorted(self.cu_seqlens, tokens, right=True)
        return self.cu_seqlens[following - 1], self.cu_seqlens[following]

    def positions(self) -> Tensor:
        """int64 [T] on the host: each token's place within its own document, from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths])
