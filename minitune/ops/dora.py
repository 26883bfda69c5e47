"""dora: how long each row of W + s·B·A is, which DoRA divides by (Liu et al. 2024, arXiv:2402.09353, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 1024
"""Rows of the weight that lie in fp32 at a time."""


def reference(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """weight [N, K], a [R, K], b [N, R] with the scale in it -> the lengths of the rows of W + b·a, [N]."""
    whole = weight if a is None or b is None else weight + b @ a
    return torch.linalg.vector_norm(whole, dim=1)


def row_lengths(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The same in fp32 without forming the sum: a row's square is ‖w‖² + 2·(w·Aᵀ)·b + b·(A·Aᵀ)·bᵀ.

    So it costs one thin product with the weight for each pass, not a second weight; in fp32, some rows at a time, since
    the terms may cancel. A row that the adapter cancels is found to within the rounding of the terms, and is never 0.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    wide_a = weight.new_empty(0, weight.shape[1], dtype=wide) if a is None else a.to(wide)
    wide_b = weight.new_empty(len(weight), 0, dtype=wide) if b is None else b.to(wide)
    gram, squares = wide_a @ wide_a.mT, []
    for rows in range(0, len(weight), CHUNK_ROWS):
        part = weight[rows : rows + CHUNK_ROWS].to(wide)
        own = wide_b[rows : rows + CHUNK_ROWS]
        square = torch.linalg.vector_norm(part, dim=1).square_()
        squares.append(square.add_(((2 * (part @ wide_a.mT) + own @ gram) * own).sum(1)))
    return torch.cat(squares).clamp_min_(torch.finfo(wide).tiny).sqrt_()
