"""rms_norm: y = x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.ops.chunks import in_cache


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d] -> [..., d] in x's dtype. Statistics in fp32 (fp64 stays), as Llama's own code does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (y [..., d] in x's dtype, 1/rms [..., 1] fp32, which `backward` and `apply` want)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        wide = x[rows].to(rstd.dtype)      # once: an op of mixed dtypes would do it by itself
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=rstd[rows])
        rstd[rows].square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        torch.mul((wide * rstd[rows]).to(x.dtype), weight, out=y[rows])
    return y, rstd


def apply(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """y from x and its stored 1/rms: what recomputing costs."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        torch.mul((x[rows].to(rstd.dtype) * rstd[rows]).to(x.dtype), weight, out=y[rows])
    return y


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dy [..., d] -> dx [..., d] in x's dtype; the weight is frozen here.

    With g = dy·weight: dx = rstd · (g - x · rstd² · mean(g·x)).
    """
    dx, wide_weight = torch.empty_like(x, memory_format=torch.contiguous_format), weight.to(rstd.dtype)
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        wide, r = x[rows].to(rstd.dtype), rstd[rows]
        gradient = dy[rows].to(rstd.dtype) * wide_weight
        projection = torch.linalg.vecdot(gradient, wide)[..., None].mul_(r * r / -x.shape[-1])
        dx[rows] = gradient.addcmul_(wide, projection).mul_(r)
    return dx


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = forward(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, rstd, weight = ctx.saved_tensors
        return backward(dy, x, rstd, weight), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Differentiable in x by the hand-written backward; a weight that is trained takes the reference under autograd."""
    if weight.requires_grad and torch.is_grad_enabled():
        return reference(x, weight, eps)
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out
