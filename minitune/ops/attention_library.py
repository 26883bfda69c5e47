"""attention on a GPU by torch's own kernels: FlashAttention on the packed stream; cuDNN where all documents are equally
long; else SDPA per document.

FlashAttention and cuDNN's forward give the log-sum-exp beside the result, as our own kernel does, so any of them can do
the forward and another one the backward. torch's operators change their arguments between releases: their signature is
read, not torch's version.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minitune.ops.deterministic import deterministic
from minitune.ops.documents import Documents

_SWITCH = threading.Lock()
Gradients = tuple[Tensor, Tensor, Tensor]


# ---- FlashAttention -------------------------------------------------------------------------------------------------
def flash(q: Tensor, window: int | None) -> bool:
    """Whether FlashAttention takes it as one packed stream: 16 bits, heads of at most 256, a GPU of sm_80 or newer, and
    a torch whose operators know windows if there is one."""
    if not _fused(q, 256):
        return False
    windows = _flash_windows()
    return windows is not None and (window is None or windows)


def _fused(q: Tensor, most: int) -> bool:
    """Whether the fused kernels of a library take such values, in heads of at most so many."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > most:
        return False
    return q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0)


@functools.cache
def _flash_windows() -> bool | None:
    """Whether FlashAttention's operators know sliding windows; None where they lack what packed training needs."""
    names = []
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            return None
        names.append({argument.name for argument in packet.default._schema.arguments})
    if not all({"cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal"} <= known for known in names):
        return None
    return all({"window_size_left", "window_size_right"} <= known for known in names)


def _window(window: int | None) -> dict[str, int]:
    """Keys to the left and right that a query sees; -1: all."""
    if not _flash_windows():
        return {}
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def flash_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> tuple[Tensor, Tensor]:
    """q [T, heads, d], k, v [T, kv_heads, d] -> (out [T, heads, d], log-sum-exp fp32 [heads, T])."""
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, longest, longest, 0.0,
                                                           window is None, False, **_window(window))
    return out, lse


def flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents,
                   window: int | None) -> Gradients:
    """dout [T, heads, d], operands, result and log-sum-exp of a forward -> (dq, dk, dv), the same bits each time."""
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    unused = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)     # of dropout, which there is none of
    with _deterministic():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, window is None, *unused,
            **_window(window))
    return dq, dk, dv


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention's backward adds in a fixed order only where this flag is set and more than a wish.

    Around FlashAttention only: the library's products would ask for a workspace setting. Two GPUs' backwards run in
    threads of their own, so they take turns at the flag.
    """
    with _SWITCH, deterministic(warn_only=False, fill=False):
        yield


# ---- cuDNN ----------------------------------------------------------------------------------------------------------
SHORT = 64
"""Shorter documents are not for cuDNN: it refuses those of one token, and plain products are as good."""


def cudnn(q: Tensor, documents: Documents, window: int | None) -> bool:
    """Whether cuDNN takes it: 16 bits, heads of at most 128, no window that hides anything, a GPU of sm_80 or newer,
    lengths that the host knows, not all of them short."""
    if not documents.exact or documents.max_seqlen < SHORT:
        return False
    return _fused(q, 128) and (window is None or window >= documents.max_seqlen)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """As `flash_forward`, for documents of which the host knows that all are equally long."""
    n = documents.n_equal
    assert n is not None
    out, lse = _cudnn(*(_batched(x, n) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(0, 1), lse.view(n, q.shape[1], -1).transpose(0, 1).flatten(1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [n, heads, length, d], k, v [n, kv_heads, length, d] -> (out like q, log-sum-exp fp32 [n, heads, length, 1]),
    differentiable."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return out, lse


def _batched(x: Tensor, n: int) -> Tensor:
    """[n · length, heads, d] -> [n, heads, length, d], a view."""
    return x.unflatten(0, (n, -1)).transpose(1, 2)


# ---- by autograd ----------------------------------------------------------------------------------------------------
class Graph(NamedTuple):
    """A library call as a piece of autograd graph of its own: leaves and result."""

    leaves: tuple[Tensor, Tensor, Tensor]
    out: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, needs_backward: bool = True,
            by_cudnn: bool = False) -> tuple[Tensor, Graph | None]:
    """q [T, heads, d], k, v [T, kv_heads, d] -> (out [T, heads, d], graph for `backward` or None), `by_document`."""
    if not needs_backward:
        with torch.no_grad():
            return by_document(q, k, v, documents, window, by_cudnn), None
    with torch.enable_grad():
        leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
        out = by_document(*leaves, documents, window, by_cudnn)
    return out.detach(), Graph(leaves, out)


def backward(dout: Tensor, graph: Graph, keep_graph: bool = False) -> Gradients:
    """dout [T, heads, d] -> (dq, dk, dv). With `keep_graph` it may be asked once more."""
    with torch.enable_grad():
        dq, dk, dv = torch.autograd.grad(graph.out, graph.leaves, dout.contiguous(), retain_graph=keep_graph)
    return dq, dk, dv


def by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None,
                by_cudnn: bool = False) -> Tensor:
    """One SDPA call for each run of equally long documents: any device, any dtype, differentiable. On a GPU by plain
    products, slow and with memory that grows with T², for no fused kernel but FlashAttention has a repeatable backward;
    or by cuDNN, but for short documents, for whoever can do without; where no window hides anything."""
    outs, start, lengths = [], 0, [length for length in documents.lengths if length]
    while lengths:
        n = next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))
        length, lengths = lengths[0], lengths[n:]
        rows = slice(start, start + n * length)
        start = rows.stop
        qs, ks, vs = (_batched(x[rows], n) for x in (q, k, v))
        if by_cudnn and length >= SHORT:
            outs.append(_cudnn(qs, ks, vs)[0].transpose(1, 2).flatten(0, 1))
            continue
        mask = None
        if window is not None and window < length:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < window)
        with sdpa_kernel(SDPBackend.MATH) if q.device.type == "cuda" else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None,
                                                 enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
