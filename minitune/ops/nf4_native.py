"""What PyTorch has to know of the extension's ops beside their code: the shapes they give (for torch.compile)."""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.ops import nf4


@torch.library.register_fake("minitune::nf4_dequantize")
def _(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
      nested_offset: Tensor | None, table: Tensor, blocksize: int, rows: int, columns: int,
      dtype: torch.dtype) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.register_fake("minitune::nf4_dequantize_out")
def _(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
      nested_offset: Tensor | None, table: Tensor, blocksize: int, out: Tensor) -> None:
    return None


@torch.library.register_fake("minitune::nf4_product")
def _(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
      nested_offset: Tensor | None, table: Tensor, blocksize: int, x: Tensor, y: Tensor) -> None:
    return None


@torch.library.register_fake("minitune::nf4_quantize")
def _(weight: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    return (weight.new_empty((n + 1) // 2, dtype=torch.uint8),
            weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32))


@torch.library.register_fake("minitune::nf4_quantize_absmax")
def _(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    n, block = absmax.numel(), nf4.NESTED_BLOCKSIZE
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty((n + block - 1) // block)
