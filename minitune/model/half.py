"""One half of a layer as one autograd function: what it keeps for its hand-written backward, by memory policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

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


Need = Literal["both", "branch", "kept"]
"""What a forward pass is for: the branch with or without a backward to come, or only what the backward uses."""

Kept = dict[str, Any]
"""The named list of what a half keeps between forward and backward."""


class Half(Protocol):
    """What `run` asks of a half: branch = f(norm(x)). The next half adds it to x in one pass with its own norm."""

    @property
    def needs_composed(self) -> bool:
        """Whether plain autograd has to take it (dropout, trained base weights)."""

    def composed(self, x: Tensor, context: Context) -> Tensor:
        """The specification: x [T, d] -> branch [T, d] by reference ops under plain autograd."""

    def operands(self) -> tuple[LoraWeights, LoraWeights]:
        """Weights and adapter images of its two products, as they stand now."""

    def forward_keeping(self, x: Tensor, branch: Tensor | None, weights: tuple[LoraWeights, LoraWeights],
                        context: Context, need: Need = "both") -> tuple[Tensor | None, Kept]:
        """x [T, d] and the branch of the half before -> (branch [T, d], everything that the backward can use, among it
        "x", the sum). With need "kept" the last product is left out, and None comes in the branch's place."""

    def cheap(self) -> frozenset[str]:
        """The kept entries that `backward_from` can do without, at the price of a pointwise pass."""

    def backward_from(self, dy: Tensor, past: Tensor | None, kept: Kept, weights: tuple[LoraWeights, LoraWeights],
                      context: Context, way: Way) -> tuple[Tensor | None, list[Tensor]]:
        """dy [T, d], the gradient of the branch, and `past`, that of the sum -> (dx [T, d] or None, gradients of
        `adapter_parameters`). Neither is written to."""

    def adapter_parameters(self) -> Sequence[Tensor]:
        """fp32 parameters that get a gradient, in a fixed order."""


class Way(NamedTuple):
    """How a backward may go: whether its input's gradient is wanted, and whether what was kept may be overwritten."""

    need_dx: bool
    overwrite: bool


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, half: Half, context: Context,
                *parameters: Tensor) -> tuple[Tensor | None, Tensor | None]:
        full = context.policy == "full"
        weights = half.operands()
        y, kept = half.forward_keeping(x, branch, weights, context, "branch" if full else "both")
        total = kept["x"]
        if full:
            kept = {"x": total}
        elif context.policy == "pointwise":
            kept = {name: value for name, value in kept.items() if name not in half.cheap()}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        ctx.others = {name: value for name, value in kept.items() if name not in tensors}
        ctx.half, ctx.weights, ctx.context = half, weights, context
        ctx.set_materialize_grads(False)
        return (None if branch is None else total), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        half, weights, context = ctx.half, ctx.weights, ctx.context
        if dy is None:      # nobody asked for the branch
            return past, past, None, None, *[None] * len(half.adapter_parameters())
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        if context.policy == "full":
            kept = half.forward_keeping(kept["x"], None, weights, context, "kept")[1]
        need_branch = ctx.needs_input_grad[1]
        way = Way(ctx.needs_input_grad[0] or need_branch, overwrite=last or context.policy == "full")
        dx, gradients = half.backward_from(dy, past, kept, weights, context, way)
        if last:
            ctx.others = {}     # a library's graph: a loss that is still referenced must not keep it alive
        return dx, dx if need_branch else None, None, None, *gradients


def run(half: Half, x: Tensor, branch: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """x [T, d] and the branch of the half before (None before the first) -> (x + branch, this half's own branch), by
    the half's fast path, or by plain autograd where `needs_composed`."""
    if not torch.is_grad_enabled():
        y, kept = half.forward_keeping(x, branch, half.operands(), context, "branch")
        assert y is not None
        return kept["x"], y
    if not half.needs_composed:
        total, y = _Run.apply(x, branch, half, context, *half.adapter_parameters())
        return x if total is None else total, y
    total = x if branch is None else x + branch
    if context.policy != "keep":       # plain autograd has no cheaper list to keep than none
        return total, checkpoint(half.composed, total, context, use_reentrant=False)
    return total, half.composed(total, context)
