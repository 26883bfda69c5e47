"""attention on a GPU by torch's own kernels: FlashAttention on the packed stream where it is, else SDPA per document.

torch's varlen attention changed its arguments between releases, so its signature is read, not its version.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minitune.ops.documents import Documents

_SWITCH = threading.Lock()


class Graph(NamedTuple):
    """The library call as a piece of autograd graph of its own: leaves and result."""

    leaves: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    flash: bool


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None,
            needs_backward: bool = True) -> tuple[Tensor, Graph | None]:
    """q [T, heads, d], k, v [T, kv_heads, d] -> (out [T, heads, d], graph for `backward` or None)."""
    if not needs_backward:
        with torch.no_grad():
            return _attend(q, k, v, documents, window), None
    with torch.enable_grad():
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        out = _attend(*leaves, documents, window)
    return out.detach(), Graph(leaves, out, flash(q, window))


def backward(dout: Tensor, graph: Graph, keep_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """dout [T, heads, d] -> (dq, dk, dv), the same bits each time. With `keep_graph` it may be asked once more."""
    with torch.enable_grad(), _deterministic() if graph.flash else contextlib.nullcontext():
        dq, dk, dv = torch.autograd.grad(graph.out, graph.leaves, dout.contiguous(), retain_graph=keep_graph)
    return dq, dk, dv


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention's backward adds in a fixed order only where this flag is set and more than a wish.

    The flag alone: torch's public switch also rewrites the compiler's settings, which are the user's, and fills every
    new tensor. Around FlashAttention only: the library's products would ask for a workspace setting.
    """
    _SWITCH.acquire()       # two GPUs' backwards run in threads of their own
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory      # type: ignore[attr-defined]
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False     # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        _SWITCH.release()


def flash(q: Tensor, window: int | None) -> bool:
    """Whether FlashAttention takes it as one packed stream: 16 bits, heads of at most 256, a GPU of sm_80 or newer, and
    a torch whose varlen attention knows windows if there is one. All else is slow, and the memory grows with T²."""
    half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if not half or q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    varlen = _varlen()
    return varlen is not None and (window is None or varlen.windows)


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    varlen = _varlen()
    if varlen is not None and flash(q, window):
        return varlen.attend(q, k, v, documents, window)
    return by_document(q, k, v, documents, window)


class Varlen(NamedTuple):
    """torch's varlen attention behind one signature, and whether it knows sliding windows."""

    attend: Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]
    windows: bool


@functools.cache
def _varlen() -> Varlen | None:
    """None where this torch lacks what packed training needs."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "is_causal" not in names and "window_size" not in names:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        options: dict[str, Any] = {}
        if "window_size" in names:
            options["window_size"] = (-1 if window is None else window - 1, 0)      # (n, 0): causal
        else:
            options["is_causal"] = True
        if "enable_gqa" in names:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        bounds, longest = documents.cu_seqlens, documents.max_seqlen
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        return out if isinstance(out, Tensor) else out[0]

    return Varlen(attend, "window_size" in names)


def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """One SDPA call for each run of equally long documents: any device, any dtype, differentiable. On a GPU by plain
    products, since its fused kernels have no repeatable backward for what FlashAttention does not take."""
    outs, start, lengths = [], 0, [length for length in documents.lengths if length]
    while lengths:
        n = next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))
        length, lengths = lengths[0], lengths[n:]
        rows = slice(start, start + n * length)
        start = rows.stop
        qs, ks, vs = (x[rows].unflatten(0, (n, length)).transpose(1, 2) for x in (q, k, v))
        mask = None
        if window is not None and window < length:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < window)
        with sdpa_kernel(SDPBackend.MATH) if q.device.type == "cuda" else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None,
                                                 enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
