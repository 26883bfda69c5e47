"""lora_gradients: each adapter's own gradients out of those of its whole projection."""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.ops import backends

MAX_RANK = 1024
"""The kernel takes the ranks of a row in one program."""


def reference(da: Tensor, db: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """da [r, K] and db [n, r], rows and ranks of what `lora_matmul.backward_adapters` gives -> (da, scale · db) in
    fp32 (fp64 stays)."""
    wide = torch.promote_types(da.dtype, torch.float32)
    return da.to(wide), db.to(wide) * scale


def apart(da: Tensor, db: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same. da and db are given up: a result may lie in the memory of its operand."""
    small = db.shape[1] <= MAX_RANK and max(da.numel(), db.numel()) < 2**30
    if small and da.is_contiguous() and backends.choose("lora_gradients", db.device, dtype=db.dtype) == "triton":
        from minitune.kernels import lora_gradients as kernel

        return kernel.apart(da, db, scale)
    wide = torch.promote_types(da.dtype, torch.float32)
    return da.to(wide), db.to(wide).mul_(scale)
