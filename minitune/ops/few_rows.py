"""few_rows: x·Wᵀ + bias where x has few rows, as in decoding on a CPU: the weight is read once, at the memory's rate.

One row is a matrix-vector product, which reads the weight as it lies: in bf16 by the extension, which asks for it
ahead. For a few rows oneDNN would lay the weight out anew in each product; `pack` does that once. The packed copy costs
the weight's memory again, so generation makes it and drops it (`model/generate.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from minitune.ops import backends, products


def pack(weight: Tensor) -> Tensor | None:
    """weight [N, K] -> its packed copy, or None where packing does not apply: not bf16, not on a CPU, no oneDNN."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return packed


def product(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, packed: Tensor | None = None,
            out: Tensor | None = None) -> Tensor:
    """x [n, K] and weight [N, K], or else its packed copy -> x·Wᵀ + bias [n, N], in `out` where that is given (not
    with a packed weight)."""
    if packed is not None:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result
    assert weight is not None
    if out is not None:
        return products.mm(x, weight.mT, out) if bias is None else torch.addmm(bias, x, weight.mT, out=out)
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)     # then it needs a gradient
    if len(x) == 1 and x.device.type == "cpu" and not tracked:
        y = x.new_empty(1, len(weight))
        vector_product(weight)(x[0].contiguous(), y[0])
        return y if bias is None else y.add_(bias)
    return products.mm(x, weight.mT) if bias is None else torch.addmm(bias, x, weight.mT)


def vector_product(weight: Tensor) -> Callable[[Tensor, Tensor], object]:
    """What writes weight [N, K] times x [K] into y [N], all contiguous and on a CPU."""
    if weight.dtype == torch.bfloat16 and weight.numel() and backends.by_rows("few_rows", weight):
        return functools.partial(torch.ops.minitune.rows_product.default, weight)
    return lambda x, y: torch.mv(weight, x, out=y)      # in fp32 it is the faster one
