"""packed_weight: a bf16 weight laid out once as oneDNN's kernels want it, for products with few rows on a CPU.

A token's decoding multiplies one row by every weight; oneDNN else lays the weight out anew in each product. The
packed copy costs the weight's memory again, so generation makes it and drops
it (`model/generate.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(weight: Tensor) -> Tensor | None:
    """weight [N, K] -> its packed copy, or None where packing does not apply: not bf16, not on a CPU, no oneDNN."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, K] -> x·Wᵀ + bias [n, N]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
