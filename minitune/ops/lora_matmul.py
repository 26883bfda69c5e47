"""lora_matmul: y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ for a fused projection and the adapters of its parts.

Three ways give the same: thin products beside the library's (addmm); the library's product over operands that hold the
adapters in their margins (augmented, `ops/augmented.py`); our Triton kernel, whose loop runs over K and then over the
rank. A CPU takes the augmented one in bf16, all else addmm, until `minitune tune` measured another to be faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.ops import augmented, backends, few_rows, products, tuned
from minitune.ops.augmented import Augmented
from minitune.ops.nf4_linear import FusedNF4, nf4_linear

CPU_ROWS = 256
"""From so many rows on a CPU takes the augmented product by itself: fewer are generation's, which `few_rows` serves."""


class LoraWeights(NamedTuple):
    """A fused projection in the compute dtype: weight [N, K], perhaps in NF4, bias [N] or None, and its adapters side
    by side.

    a [R, K] holds the A of every adapted part below each other; b [N, R] holds s·B of each part in its own rows and
    columns and zeros elsewhere, so that one product serves them all. Both are None without an adapter. ``packed`` is
    the weight once more for generation on a CPU (`few_rows`); ``around`` is what the weight lies in where it was laid
    out for the augmented product. ``gain`` fp32 [N] is DoRA's factor of each row, in passes without a backward.
    """

    weight: Tensor | FusedNF4
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    packed: Tensor | None = None
    around: Augmented | None = None
    gain: Tensor | None = None

    def way(self, step: str, tokens: int) -> str:
        """addmm, augmented or triton; `step` is "forward", "input" or "adapters" (of the backward)."""
        assert self.a is not None
        shape = (*self.weight.shape, len(self.a), tokens)
        decoded = step != "adapters" and isinstance(self.weight, FusedNF4)      # the adapters' gradients read no weight
        measured = tuned.way(f"lora_matmul {step}", shape, self.a.device, self.a.dtype, decoded)
        if measured is None and step != "adapters" and tokens >= CPU_ROWS and _fits_cpu(self.weight.shape, self.a):
            measured = "augmented"
        chosen = backends.choose("lora_matmul", self.a.device, measured)
        return "addmm" if chosen == "reference" else chosen

    def margins(self) -> Augmented | None:
        """The operand of the augmented product, if it holds these adapters: that of an older pass does not any more."""
        return self.around if self.around is not None and self.around.holds(self.a) else None


def reference(x: Tensor, w: LoraWeights) -> Tensor:
    """x [T, K] -> y [T, N]: what it means, differentiable by autograd."""
    if w.gain is not None:
        y = reference(x, w._replace(gain=None, bias=None)) * w.gain
        return (y if w.bias is None else y + w.bias).to(x.dtype)
    if isinstance(w.weight, FusedNF4):
        y = nf4_linear(x, w.weight, w.bias)
    else:
        y = torch.nn.functional.linear(x, w.weight, w.bias)
    return y if w.a is None or w.b is None else y + x @ w.a.mT @ w.b.mT


def _fits_cpu(shape: tuple[int, ...], like: Tensor) -> bool:
    """Whether a CPU takes the augmented product without being measured: `benchmarks/bench_lora.py` found it to be the
    faster one in bf16. Rows of whole blocks only: at others oneDNN reads what lies behind them."""
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and all(size % 64 == 0 for size in shape)


def wants_margins(n_rows: int, columns: int, rank: int, like: Tensor, quantized: bool = False) -> bool:
    """Whether the augmented product is the fastest at this weight, perhaps in NF4, and rank, for some rows."""
    found = (tuned.ways(f"lora_matmul {step}", (n_rows, columns, rank), like.device, like.dtype, quantized)
             for step in ("forward", "input"))
    return _fits_cpu((n_rows, columns), like) or any("augmented" in ways for ways in found)


def input_rows(tokens: int, w: LoraWeights) -> Tensor | None:
    """Where the op before should write x [T, K]: rows with room for S behind them, or None for anywhere."""
    around = w.margins()
    if around is None or w.a is None or w.packed is not None or w.way("forward", tokens) != "augmented":
        return None
    return augmented.rows(tokens, around.columns, around.room, w.a)


def gradient_rows(tokens: int, w: LoraWeights) -> Tensor | None:
    """Where dy [T, N] should be written: rows with room for dS behind them, or None for anywhere."""
    around = w.margins()
    if around is None or w.a is None or w.way("input", tokens) != "augmented":
        return None
    return augmented.rows(tokens, around.n_rows, around.room, w.a)


def forward(x: Tensor, w: LoraWeights, *, out: Tensor | None = None,
            s: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x [T, K] -> (y [T, N], S as of `forward_s`). y lies in `out` [T, N] where that is given; `s` is S, if it came
    with x."""
    if w.gain is not None:
        y, s = forward(x, w._replace(gain=None, bias=None), out=out, s=s)
        y.mul_(w.gain)
        return (y if w.bias is None else y.add_(w.bias)), s
    s = forward_s(x, w) if s is None else s
    if s is None or w.a is None or w.b is None:
        return _base(x, w, out), None
    around = w.margins()
    behind = None if around is None else augmented.tail(x, around.room)
    if around is not None and behind is not None:
        with around.holding(w.a, w.b) as whole:
            return augmented.forward(augmented.joined(x, behind, s), whole, around.n_rows, w.bias, out), s
    if w.packed is None and w.way("forward", len(x)) == "triton":
        with _dense(w) as weight:
            from minitune.kernels import lora_matmul as kernel

            return kernel.forward(x, weight, s, w.b, w.bias, out=out), s
    return _base(x, w, out).addmm_(s, w.b.mT), s


@contextlib.contextmanager
def _dense(w: LoraWeights) -> Iterator[Tensor]:
    """The weight [N, K], decoded where it lies in NF4, for the product within the block."""
    if isinstance(w.weight, Tensor):
        yield w.weight
    else:
        with w.weight.decoded() as weight:
            yield weight


def _base(x: Tensor, w: LoraWeights, out: Tensor | None) -> Tensor:
    """x·Wᵀ + bias."""
    if w.packed is not None:
        return few_rows.product(x, None, w.bias, w.packed)
    if len(x) == 1 and out is None and isinstance(w.weight, FusedNF4) and w.weight.reads_packed(x.dtype):
        y = x.new_empty(1, len(w.weight))
        w.weight.vector_product()(x[0].contiguous(), y[0])
        return y if w.bias is None else y.add_(w.bias)
    with _dense(w) as weight:
        return few_rows.product(x, weight, w.bias, out=out)


def forward_s(x: Tensor, w: LoraWeights) -> Tensor | None:
    """x [T, K] -> S = x·Aᵀ [T, R], which the backward wants; None without an adapter."""
    return None if w.a is None else x @ w.a.mT


def backward_s(dy: Tensor, w: LoraWeights) -> Tensor | None:
    """dy [T, N] -> dS = dy·B [T, R] with the scale in it; None without an adapter."""
    return None if w.b is None else dy @ w.b


def backward_input(dy: Tensor, ds: Tensor | None, w: LoraWeights) -> Tensor:
    """dy [T, N] and dS [T, R] -> dx = dy·W + dS·A [T, K]."""
    if ds is None or w.a is None or w.b is None:
        with _dense(w) as weight:
            return products.mm(dy, weight)
    around = w.margins()
    behind = None if around is None else augmented.tail(dy, around.room)
    if around is not None and behind is not None:
        with around.holding(w.a, w.b) as whole:
            return augmented.backward_input(augmented.joined(dy, behind, ds), whole, around.columns)
    with _dense(w) as weight:
        if w.way("input", len(dy)) == "triton":
            from minitune.kernels import lora_matmul as kernel

            dx = kernel.backward_input(dy, weight, ds, w.a)
            return dx
        dx = products.mm(dy, weight)
    return dx.addmm_(ds, w.a)


def backward_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of a base weight that is trained, fp32 [N, K] (fp64 stays), from dy [T, N] and x [T, K]; rounded
    to their dtype first, as the library's products are."""
    return (dy.mT @ x).to(torch.promote_types(dy.dtype, torch.float32))


def backward_adapters(dy: Tensor, x: Tensor, s: Tensor, ds: Tensor, w: LoraWeights) -> tuple[Tensor, Tensor]:
    """(dA [R, K], dB [N, R]) from dy [T, N], x [T, K], S and dS [T, R]; dB without the scale and with cross terms.

    dB comes as the transpose of Sᵀ·dy: so both products read their large operand row by row.
    """
    if w.way("adapters", len(dy)) == "triton":
        from minitune.kernels import lora_matmul as kernel

        da, db = kernel.backward_adapters(dy, x, s, ds)
        return da, db
    return ds.mT @ x, (s.mT @ dy).mT
