"""products: x·W of a CPU, where the library leaves threads idle: a part of the rows on each thread.

oneDNN (bf16 in tiles) divides a product among threads by blocks. With two threads, a few hundred rows for each and a
narrow result it finds too few blocks, and one thread does all. So many rows keep a thread as busy as any number, so
they are divided here, and the library's own product does each part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.ops import backends

THREADS, ROWS, COLUMNS, LEAST_DEPTH = 2, range(640, 1537), range(512, 1024), 512
"""Where `benchmarks/bench_products.py` found idle threads at many shapes, and little to lose at the others: rows and
columns of the result, x's columns. Nobody has measured more threads; the program tells."""


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
    """Whether the library would leave a thread idle, and nobody wants a gradient. In inference mode another thread may
    not write into our tensors."""
    depth, columns = right.shape
    if len(x) not in ROWS or columns not in COLUMNS or depth < LEAST_DEPTH or torch.get_num_threads() != THREADS:
        return False
    if torch.is_inference_mode_enabled() or backends.choose("products", x.device, dtype=x.dtype) != "native":
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or right.requires_grad))
