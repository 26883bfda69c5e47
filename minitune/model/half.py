"""One half of a layer as one autograd function: what it keeps for its hand-written backward, by memory policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minitune.config import MemoryPolicy
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights


class Context(NamedTuple):
    """What every layer of a forward pass shares: the rotation's cos and sin fp32 [T, head_dim / 2], the documents, and
    the memory policy, already decided."""

    cos: Tensor
    sin: Tensor
    documents: Documents
    policy: MemoryPolicy = "keep"


Kept = dict[str, Any]
"""The named list of what a half keeps between forward and backward."""


class Half(Protocol):
    """What `run` asks of a half."""

    @property
    def needs_composed(self) -> bool:
        """Whether plain autograd has to take it (dropout, trained base weights)."""

    def composed(self, x: Tensor, context: Context) -> Tensor:
        """The specification: reference ops under plain autograd."""

    def operands(self) -> tuple[LoraWeights, LoraWeights]:
        """Weights and adapter images of its two products, as they stand now."""

    def forward_keeping(self, x: Tensor, weights: tuple[LoraWeights, LoraWeights], context: Context,
                        needs_backward: bool) -> tuple[Tensor, Kept]:
        """x [T, d] -> (y [T, d], everything that the backward can use)."""

    def cheap(self) -> frozenset[str]:
        """The kept entries that `restore` forms again at the price of a pointwise pass."""

    def restore(self, kept: Kept) -> None:
        """Put the cheap entries back."""

    def backward_from(self, dy: Tensor, kept: Kept, weights: tuple[LoraWeights, LoraWeights], context: Context,
                      need_dx: bool) -> tuple[Tensor | None, list[Tensor]]:
        """dy [T, d] -> (dx [T, d] or None, gradients of `adapter_parameters`)."""

    def adapter_parameters(self) -> Sequence[Tensor]:
        """fp32 parameters that get a gradient, in a fixed order."""


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: Half, context: Context, *parameters: Tensor) -> Tensor:
        full = context.policy == "full"
        weights = half.operands()
        y, kept = half.forward_keeping(x, weights, context, needs_backward=not full)
        if full:
            kept = {"x": x}
        elif context.policy == "pointwise":
            kept = {name: value for name, value in kept.items() if name not in half.cheap()}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        ctx.others = {name: value for name, value in kept.items() if name not in tensors}
        ctx.half, ctx.weights, ctx.context = half, weights, context
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        half, weights, context = ctx.half, ctx.weights, ctx.context
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
        if context.policy == "full":
            kept = half.forward_keeping(kept["x"], weights, context, needs_backward=True)[1]
        elif context.policy == "pointwise":
            half.restore(kept)
        dx, gradients = half.backward_from(dy, kept, weights, context, ctx.needs_input_grad[0])
        ctx.others = {}     # a library's graph: a loss that is still referenced must not keep it alive
        return dx, None, None, *gradients


def run(half: Half, x: Tensor, context: Context) -> Tensor:
    """x [T, d] -> y [T, d] by the half's fast path, or by plain autograd where `needs_composed`."""
    if not torch.is_grad_enabled():
        return half.forward_keeping(x, half.operands(), context, needs_backward=False)[0]
    if not half.needs_composed:
        out: Tensor = _Run.apply(x, half, context, *half.adapter_parameters())
        return out
    if context.policy != "keep":       # plain autograd has no cheaper list to keep than none
        composed: Tensor = checkpoint(half.composed, x, context, use_reentrant=False)
        return composed
    return half.composed(x, context)
