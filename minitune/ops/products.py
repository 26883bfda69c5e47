"""products: x·W of a CPU, where the library leaves threads idle: a part of the rows on each thread.

oneDNN (3.11, bf16 in tiles) divides a product among threads by blocks. With a few hundred rows for each thread and a
narrow result it finds too few blocks, and one thread does all. A product of so many rows is as fast on one thread as
such a thread ever is, so the rows are divided here, and the library's own product does each part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.ops import backends

ROWS = range(320, 769)
"""Of one thread, and"""
COLUMNS = range(256, 1153)
"""of the result: where `benchmarks/bench_products.py` found idle threads; beyond, both ways take the same time."""


def reference(x: Tensor, right: Tensor) -> Tensor:
    """x [T, K] and right [K, N] -> x·right [T, N]."""
    return x @ right


def mm(x: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`reference`, in `out` [T, N] where that is given; autograd does not see it where it goes by parts."""
    if not _apart(x, right):
        return torch.mm(x, right) if out is None else torch.mm(x, right, out=out)
    return apart(x, right, x.new_empty(len(x), right.shape[1]) if out is None else out)


def apart(x: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`reference` in `out`, by parts; where the backend is native."""
    torch.ops.minitune.product_apart(x.detach(), right.detach(), out)
    return out


def _apart(x: Tensor, right: Tensor) -> bool:
    """Whether the library would leave threads idle, and no gradient is asked for."""
    threads = torch.get_num_threads()
    if threads == 1 or -(-len(x) // threads) not in ROWS or right.shape[1] not in COLUMNS:
        return False
    if backends.choose("products", x.device, dtype=x.dtype) != "native":
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or right.requires_grad))
