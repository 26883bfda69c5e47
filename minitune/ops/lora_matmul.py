"""lora_matmul: y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ for a fused projection and the adapters of its parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitune.ops import few_rows
from minitune.ops.nf4_linear import FusedNF4, nf4_linear


class LoraWeights(NamedTuple):
    """A fused projection in the compute dtype: weight [N, K], perhaps in NF4, bias [N] or None, and its adapters side
    by side.

    a [R, K] holds the A of every adapted part below each other; b [N, R] holds s·B of each part in its own rows and
    columns and zeros elsewhere, so that one product serves them all. Both are None without an adapter. ``packed`` is
    the weight once more for generation on a CPU (`few_rows`).
    """

    weight: Tensor | FusedNF4
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    packed: Tensor | None = None


def reference(x: Tensor, w: LoraWeights) -> Tensor:
    """x [T, K] -> y [T, N]: what it means, differentiable by autograd."""
    if isinstance(w.weight, FusedNF4):
        y = nf4_linear(x, w.weight, w.bias)
    else:
        y = torch.nn.functional.linear(x, w.weight, w.bias)
    return y if w.a is None or w.b is None else y + x @ w.a.mT @ w.b.mT


def forward(x: Tensor, w: LoraWeights) -> tuple[Tensor, Tensor | None]:
    """x [T, K] -> (y [T, N], S as of `forward_s`)."""
    if isinstance(w.weight, Tensor) or w.packed is not None:
        y = few_rows.product(x, w.weight if isinstance(w.weight, Tensor) else None, w.bias, w.packed)
    else:
        with w.weight.decoded() as weight:
            y = few_rows.product(x, weight, w.bias)
    s = forward_s(x, w)
    return (y, None) if s is None or w.b is None else (y.addmm_(s, w.b.mT), s)


def forward_s(x: Tensor, w: LoraWeights) -> Tensor | None:
    """x [T, K] -> S = x·Aᵀ [T, R], which the backward wants; None without an adapter."""
    return None if w.a is None else x @ w.a.mT


def backward_s(dy: Tensor, w: LoraWeights) -> Tensor | None:
    """dy [T, N] -> dS = dy·B [T, R] with the scale in it; None without an adapter."""
    return None if w.b is None else dy @ w.b


def backward_input(dy: Tensor, ds: Tensor | None, w: LoraWeights) -> Tensor:
    """dy [T, N] and dS [T, R] -> dx = dy·W + dS·A [T, K]."""
    if isinstance(w.weight, Tensor):
        dx = dy @ w.weight
    else:
        with w.weight.decoded() as weight:
            dx = dy @ weight
    return dx if ds is None or w.a is None else dx.addmm_(ds, w.a)


def backward_adapters(dy: Tensor, x: Tensor, s: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """(dA [R, K], dB [N, R]) from dy [T, N], x [T, K], S and dS [T, R]; dB without the scale and with cross terms.

    dB comes as the transpose of Sᵀ·dy: so both products read their large operand row by row.
    """
    return ds.mT @ x, (s.mT @ dy).mT
