"""Documents of random tokens for small models, and the batch of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import minitune as mt


def documents(lengths: Sequence[int] = (20, 31, 9), seed: int = 5, n_ids: int = 97) -> list[Tensor]:
    """A document of each length, of the ids from 3 up to `n_ids` (that of `tests.oracles`' models)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, n_ids, (n,), generator=generator) for n in lengths]


def packed(found: Sequence[Tensor], tokens: int | None = None) -> mt.Batch:
    """All of them in one row, of their own length or with filler up to `tokens`."""
    (batch,) = mt.data.pack([d.tolist() for d in found], sum(map(len, found)) if tokens is None else tokens)
    return batch
