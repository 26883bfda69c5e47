"""A layer as autograd functions: each half by itself with a list of what it keeps, or the two of them keeping only the
layer's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitune.config import MemoryPolicy
from minitune.model.lora import Projection
from minitune.model.offload import Parking
from minitune.ops import lora_matmul, rms_norm
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.once import once
from minitune.ops.versions import unwritten


class Context(NamedTuple):
    """What every layer of a forward pass shares: the rotation's cos and sin fp32 [T, head_dim / 2], the documents, the
    memory policy, already decided, and with "offload" where the layers' inputs are parked."""

    cos: Tensor
    sin: Tensor
    documents: Documents
    policy: MemoryPolicy = "keep"
    parking: Parking | None = None


Need = Literal["both", "branch", "kept"]
"""What a forward pass is for: the branch with or without a backward to come, or only what the backward uses."""

Kept = dict[str, Any]
"""The named list of what a half keeps between forward and backward."""


class Wanted(NamedTuple):
    """How a backward may go: whether its input's gradient is wanted, and whether what was kept may be overwritten."""

    need_dx: bool
    overwrite: bool


class Half(nn.Module, ABC):
    """What `run` asks of a half: branch = f(norm(x)). The next half adds it to x in one pass with its own norm."""

    norm: nn.Parameter

    @abstractmethod
    def projections(self) -> tuple[Projection, Projection]:
        """Its two products, in the order of their parameters."""

    @abstractmethod
    def norms(self) -> list[nn.Parameter]:
        """The weights of its norms, in the order of their gradients."""

    @property
    def needs_composed(self) -> bool:
        """Whether plain autograd has to take it (dropout, DoRA)."""
        return any(projection.needs_composed for projection in self.projections())

    def trained_parameters(self) -> list[Tensor]:
        """fp32 parameters that get a gradient, in a fixed order."""
        return [p for projection in self.projections() for p in projection.trained_parameters()] + self.trained_norms()

    def base_parameters(self) -> list[Tensor]:
        """Those of them that are no adapter's."""
        return [p for projection in self.projections() for p in projection.base_parameters()] + self.trained_norms()

    def trained_norms(self) -> list[Tensor]:
        """Weights of norms that are trained; backward reads them again."""
        return [weight for weight in self.norms() if weight.requires_grad]

    def operands(self) -> tuple[LoraWeights, LoraWeights]:
        """Weights and adapter images of its two products, as they stand now."""
        first, second = self.projections()
        return first.operands(), second.operands()

    @abstractmethod
    def composed(self, x: Tensor, context: Context) -> Tensor:
        """The specification, under plain autograd: x [T, d] -> branch [T, d]. Norms, rotation and SwiGLU are their
        references; attention and products of 4 bits are the ops themselves, which tests/ops holds to theirs."""

    @abstractmethod
    def forward_keeping(self, x: Tensor, branch: Tensor | None, weights: tuple[LoraWeights, LoraWeights],
                        context: Context, need: Need = "both") -> tuple[Tensor | None, Kept]:
        """x [T, d] and the branch of the half before -> (branch [T, d], everything that the backward can use, among it
        "x", the sum). With need "kept" the last product is left out, and None comes in the branch's place."""

    @abstractmethod
    def cheap(self) -> frozenset[str]:
        """The kept entries that `backward_from` can do without, at the price of a pointwise pass."""

    @abstractmethod
    def backward_from(self, dy: Tensor, past: Tensor | None, kept: Kept, weights: tuple[LoraWeights, LoraWeights],
                      context: Context, wanted: Wanted) -> tuple[Tensor | None, list[Tensor]]:
        """dy [T, d], the gradient of the branch, and `past`, that of the sum -> (dx [T, d] or None, gradients of
        `trained_parameters`). Neither is written to; of the dict `kept` what is used up is taken out."""

    def backward_through_norm(self, d_rows: Tensor, s_name: str, weights: LoraWeights, kept: Kept, past: Tensor | None,
                              wanted: Wanted) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """The end of `backward_from`: the first product, whose output has the gradient `d_rows`, and the norm before it
        -> (dx, where it is wanted; gradients of the product's parameters; of the norm's weight, if that is trained).
        ``kept[s_name]`` is the product's S."""
        product, s = self.projections()[0], kept[s_name]
        ds = lora_matmul.backward_s(d_rows, weights)
        normed = kept.pop("normed", None)
        if normed is None and product.reads_input(s):
            normed = rms_norm.apply(kept["x"], kept["rstd"], self.norm)
        gradients = product.gradients(d_rows, normed, s, ds, weights)
        del normed
        if not wanted.need_dx and not self.norm.requires_grad:
            return None, gradients, []
        d_normed = lora_matmul.backward_input(d_rows, ds, weights)
        d_norm = [rms_norm.backward_weight(d_normed, kept["x"], kept["rstd"])] if self.norm.requires_grad else []
        if not wanted.need_dx:
            return None, gradients, d_norm
        return rms_norm.backward(d_normed, kept["x"], kept["rstd"], self.norm, past, out=d_normed), gradients, d_norm


def _is_last_backward() -> bool:
    """Whether the graph is freed behind this backward, so that what was kept may be overwritten and given away."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _packed(gradient: Tensor | None) -> Tensor | None:
    """A gradient may come expanded (of a sum, say); kernels want its values in memory, one by one."""
    return None if gradient is None else gradient.contiguous()


class _Half(torch.autograd.Function):
    """One half; "keep" and "pointwise" differ in what of the list is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, half: Half, context: Context,
                *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = half.operands()
        y, kept = half.forward_keeping(x, branch, weights, context)
        total = kept["x"]
        if context.policy == "pointwise":
            kept = {name: value for name, value in kept.items() if name not in half.cheap()}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        # Of linears the backward has copies, of adapters images; autograd tells if a norm's weight has changed.
        ctx.names, ctx.n_norms, ctx.n_parameters = tuple(tensors), len(half.trained_norms()), len(parameters)
        ctx.save_for_backward(*half.trained_norms(), *tensors.values())
        ctx.others = {name: value for name, value in kept.items() if name not in tensors}
        ctx.half, ctx.weights, ctx.context = half, weights, context
        ctx.set_materialize_grads(False)
        return (total.view_as(total) if branch is None else total), y      # autograd takes no input for an output

    @staticmethod
    @once
    def backward(ctx: Any, past: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        half = ctx.half
        need_branch, last = ctx.needs_input_grad[1], _is_last_backward()
        if dy is None:      # nobody asked for the branch
            return past, past if need_branch else None, None, None, *[None] * ctx.n_parameters
        past, dy = _packed(past), dy.contiguous()
        kept = dict(zip(ctx.names, ctx.saved_tensors[ctx.n_norms:], strict=True)) | ctx.others
        wanted = Wanted(ctx.needs_input_grad[0] or need_branch, overwrite=last)
        dx, gradients = half.backward_from(dy, past, kept, ctx.weights, ctx.context, wanted)
        if last:        # a loss that is still referenced must not keep a library's graph alive, nor the images
            ctx.others, ctx.weights = {}, None
        return dx, dx if need_branch else None, None, None, *gradients


class _Layer(torch.autograd.Function):
    """Both halves, computed again from the layer's input, which alone is kept ("full") or parked ("offload"), beside
    the adapters' images; base weights that are trained are copied again, and autograd tells if they have changed. Of
    the second pass the last product is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, halves: tuple[Half, Half], context: Context,
                *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = halves[0].operands(), halves[1].operands()
        y, kept = halves[0].forward_keeping(x, branch, weights[0], context, "branch")
        total = kept["x"]
        kept.clear()    # the memory of one half at a time
        y, kept = halves[1].forward_keeping(total, y, weights[1], context, "branch")
        ctx.ticket = None if context.parking is None else context.parking.park(total)
        ctx.save_for_backward(*halves[0].base_parameters(), *halves[1].base_parameters(),
                              *([total] if ctx.ticket is None else []))
        ctx.halves, ctx.context, ctx.images = halves, context, [[(w.a, w.b) for w in pair] for pair in weights]
        ctx.set_materialize_grads(False)
        return kept["x"], y

    @staticmethod
    @once
    def backward(ctx: Any, past: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        first, second = ctx.halves
        if dy is None:
            raise RuntimeError("a layer's branch got no gradient; only its sum with the stream has a meaning")
        past, dy, saved = _packed(past), dy.contiguous(), ctx.saved_tensors
        x = saved[-1] if ctx.ticket is None else ctx.context.parking.fetch(ctx.ticket, _is_last_backward())
        w_first, w_second = (_with_images(*each) for each in zip(ctx.halves, ctx.images, strict=True))
        y, kept = first.forward_keeping(x, None, w_first, ctx.context)
        rest = second.forward_keeping(x, y, w_second, ctx.context, "kept")[1]
        del y
        d, gradients = second.backward_from(dy, past, rest, w_second, ctx.context, Wanted(True, overwrite=True))
        del rest, w_second      # the memory of one half at a time
        need_branch = ctx.needs_input_grad[1]
        wanted = Wanted(ctx.needs_input_grad[0] or need_branch, overwrite=True)
        assert d is not None
        dx, earlier = first.backward_from(d, d, kept, w_first, ctx.context, wanted)
        if _is_last_backward():
            ctx.images = None       # a loss that is still referenced must not keep them alive
        return dx, dx if need_branch else None, None, None, *earlier, *gradients


def _with_images(half: Half, images: list[tuple[Tensor | None, Tensor | None]]) -> tuple[LoraWeights, LoraWeights]:
    """The half's operands with the images of an earlier forward pass."""
    first, second = (weights._replace(a=a, b=b) for weights, (a, b) in zip(half.operands(), images, strict=True))
    return first, second


def run_layer(first: Half, second: Half, x: Tensor, branch: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """x and branch [T, d], whose sum enters the layer -> the same of its output, by the context's memory policy."""
    composed = first.needs_composed or second.needs_composed
    if context.policy in ("full", "offload") and torch.is_grad_enabled() and not composed:
        parameters = *first.trained_parameters(), *second.trained_parameters()
        out: tuple[Tensor, Tensor] = _Layer.apply(x, branch, (first, second), context, *parameters)
        return out
    return run(second, *run(first, x, branch, context), context)


def run(half: Half, x: Tensor, branch: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """x [T, d] and the branch of the half before (None before the first) -> (x + branch, this half's own branch), by
    the half's fast path, or by plain autograd where `needs_composed`."""
    if not torch.is_grad_enabled():
        y, kept = half.forward_keeping(x, branch, half.operands(), context, "branch")
        assert y is not None
        return kept["x"], y
    if not half.needs_composed:
        total, y = _Half.apply(x, branch, half, context, *half.trained_parameters())
        return total, y
    total = x if branch is None else x + branch
    if context.policy != "keep":       # plain autograd has no cheaper list to keep than none
        again = unwritten(half.composed, half.parameters())
        return total, checkpoint(again, total, context, use_reentrant=False)
    return total, half.composed(total, context)
