"""dora: how long each row of W + s·B·A is, which DoRA divides by (Liu et al. 2024, arXiv:2402.09353, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """weight [N, K], a [R, K], b [N, R] with the scale in it -> the lengths of the rows of W + b·a, [N]."""
    whole = weight if a is None or b is None else weight + b @ a
    return torch.linalg.vector_norm(whole, dim=1)


def row_lengths(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The same in fp32 without forming the sum: a row's square is ‖w‖² + 2·(w·Aᵀ)·b + b·(A·Aᵀ)·bᵀ.

    So it costs one thin product with the weight for each pass, not a second weight. Never 0: a row that the adapter
    cancels has the smallest positive number.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()
    if a is not None and b is not None:
        cross, gram = (weight @ a.mT).to(wide), a.to(wide) @ a.to(wide).mT
        square += ((2 * cross + b.to(wide) @ gram) * b.to(wide)).sum(1)
    return square.clamp_min_(torch.finfo(wide).tiny).sqrt_()
