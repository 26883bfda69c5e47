"""rms_norm: y = x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467), with the sum of
residual stream and branch before it, and the stream's gradient after its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitune.ops import backends, tuned
from minitune.ops.chunks import in_cache
from minitune.ops.once import once
from minitune.ops.versions import written

MAX_RANK = 128
"""The most ranks, of all adapters side by side, for which the kernel gives S: their sums are in registers."""
MIN_ROWS = 8192
"""Fewer tokens leave processors of a large GPU without a program of the kernel that gives S: each takes 64."""


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d] -> [..., d] in x's dtype. Statistics in fp32 (fp64 stays), as Llama's own code does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def forward(x: Tensor, weight: Tensor, eps: float, branch: Tensor | None = None, *,
            out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., d] (+ branch [..., d]) -> (y [..., d] in x's dtype, 1/rms [..., 1] fp32, the sum that was normalised).

    1/rms is what `backward` and `apply` want. Without a branch the sum is x itself. y lies in `out` where that is
    given, which may be x.
    """
    weight = weight.to(x.dtype)     # of a trained one, which lies in fp32, every backend reads the same
    if backends.choose("rms_norm", x.device, dtype=x.dtype) == "triton":
        from minitune.kernels import rms_norm as kernel

        y, rstd, total = kernel.forward(x, weight, eps, branch, out=out)
        written(out)
        return y, rstd, x if total is None else total
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    total = x if branch is None else torch.empty_like(x)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if backends.by_rows("rms_norm", x):
        torch.ops.minitune.rows_rms_norm(x, branch, weight, eps, False, rstd, None if branch is None else total, y)
        written(out)
        return y, rstd, total
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        if branch is not None:
            torch.add(x[rows], branch[rows], out=total[rows])
        wide = total[rows].to(rstd.dtype)      # once: an op of mixed dtypes would do it by itself
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=rstd[rows])
        rstd[rows].square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        torch.mul((wide * rstd[rows]).to(x.dtype), weight, out=y[rows])
    return y, rstd, total


def forward_s(x: Tensor, weight: Tensor, eps: float, branch: Tensor | None, a: Tensor | None, *,
              out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`forward` of x [T, d], and for the projections that follow S = y·aᵀ [T, R] of their adapters a [R, d], where one
    kernel for both was measured to be the faster way; else None in its place, and whoever wants S makes it. `out` must
    be neither x nor the branch."""
    if a is not None and emits(x.device, x.dtype, (x.shape[1], len(a), len(x))):
        from minitune.kernels import rms_norm as kernel

        y, rstd, total, s = kernel.forward_s(x, weight.to(x.dtype), eps, branch, a, out=out)
        written(out)
        return y, rstd, x if total is None else total, s
    return *forward(x, weight, eps, branch, out=out), None


def emits(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether `forward_s` gives S at d, R and T."""
    if tuned.way("rms_norm s", shape, device, dtype) != "triton" or shape[1] > MAX_RANK or shape[2] < MIN_ROWS:
        return False
    return backends.choose("rms_norm", device, dtype=dtype) == "triton"


def apply(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """y from x and its stored 1/rms, with the bits of `forward`: what recomputing costs."""
    weight = weight.to(x.dtype)
    if backends.choose("rms_norm", x.device, dtype=x.dtype) == "triton":
        from minitune.kernels import rms_norm as kernel

        return kernel.apply(x, rstd, weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if backends.by_rows("rms_norm", x):
        torch.ops.minitune.rows_rms_norm(x, None, weight, 0.0, True, rstd, None, y)
        return y
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        torch.mul((x[rows].to(rstd.dtype) * rstd[rows]).to(x.dtype), weight, out=y[rows])
    return y


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, past: Tensor | None = None, *,
             out: Tensor | None = None) -> Tensor:
    """dy [..., d] -> dx [..., d] in x's dtype, with `past`, the gradient that flows past the norm, added.

    With g = dy·weight: dx = rstd · (g - x · rstd² · mean(g·x)) + past. dx lies in `out` where that is given, which may
    be dy.
    """
    weight = weight.to(x.dtype)
    if backends.choose("rms_norm", x.device, dtype=x.dtype) == "triton":
        from minitune.kernels import rms_norm as kernel

        dx = kernel.backward(dy, x, rstd, weight, past, out=out)
        written(out)
        return dx
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if backends.by_rows("rms_norm", x):
        torch.ops.minitune.rows_rms_norm_backward(dy, x, rstd, weight, past, dx)
        written(out)
        return dx
    wide_weight = weight.to(rstd.dtype)
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        wide, r = x[rows].to(rstd.dtype), rstd[rows]
        gradient = dy[rows].to(rstd.dtype) * wide_weight
        projection = torch.linalg.vecdot(gradient, wide)[..., None].mul_(r * r / -x.shape[-1])
        gradient = gradient.addcmul_(wide, projection).mul_(r)
        dx[rows] = gradient if past is None else gradient.add_(past[rows])
    return dx


def backward_weight(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dy and x [..., d], 1/rms [..., 1] -> the gradient of a weight that is trained, fp32 [d] (fp64 stays): the sum of
    dy·x·rstd over all rows. To be asked for before `backward` writes over dy."""
    if backends.choose("rms_norm", x.device, dtype=x.dtype) == "triton":
        from minitune.kernels import rms_norm as kernel

        return kernel.backward_weight(dy, x, rstd)
    total = torch.zeros(x.shape[-1], dtype=rstd.dtype, device=x.device)
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        total += (x[rows].to(rstd.dtype) * rstd[rows]).mul_(dy[rows]).flatten(0, -2).sum(0)
    return total


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, branch: Tensor | None) -> Tensor:
        y, rstd, total = forward(x, weight, eps, branch)
        ctx.save_for_backward(total, rstd, weight)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        dy = dy.contiguous()
        d_weight = backward_weight(dy, x, rstd).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = backward(dy, x, rstd, weight)
        return dx, d_weight, None, dx if ctx.needs_input_grad[3] else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, branch: Tensor | None = None) -> Tensor:
    """The norm of x (+ branch), differentiable in both and in the weight, by the hand-written backward."""
    out: Tensor = _RmsNorm.apply(x, weight, eps, branch)
    return out
