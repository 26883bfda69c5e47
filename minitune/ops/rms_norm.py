"""rms_norm: y = x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d] -> [..., d] in x's dtype. Statistics in fp32 (fp64 stays), as Llama's own code does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (y [..., d] in x's dtype, 1/rms [..., 1] fp32, which `backward` and `apply` want)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))     # once: an op of mixed dtypes would do it by itself
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype).mul_(weight), rstd


def apply(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """y from x and its stored 1/rms: what recomputing costs."""
    return (x.to(rstd.dtype) * rstd).to(x.dtype).mul_(weight)


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dy [..., d] -> dx [..., d] in x's dtype; the weight is frozen here.

    With g = dy·weight: dx = rstd · (g - x · rstd² · mean(g·x)).
    """
    wide = x.to(rstd.dtype)
    gradient = dy.to(rstd.dtype) * weight.to(rstd.dtype)
    projection = torch.linalg.vecdot(gradient, wide)[..., None].mul_(rstd * rstd / -x.shape[-1])
    return torch.addcmul(gradient, wide, projection).mul_(rstd).to(x.dtype)


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
