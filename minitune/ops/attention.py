"""attention: causal, grouped-query, within each document of a flat packed stream, optionally in a sliding window.

Two ways stand behind `forward` and `backward`. On a CPU: matrix products over blocks of queries, one pass for each
group of equally long documents. On a GPU: torch's own kernels (`attention_library`), whose piece of autograd graph is
kept for the backward. `reference` is what both must equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.ops import attention_library
from minitune.ops.documents import Documents

BLOCK = 256
"""Queries of a block: its scores stay in the cache, and what lies above the diagonal is skipped block by block."""


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim].

    Softmax in fp32 (fp64 stays); query head h reads key head h // (heads / kv_heads). With a window w a position sees
    itself and the w - 1 before it.
    """
    outs, start = [], 0
    for length in documents.lengths:
        part = slice(start, start + length)
        group = q.shape[1] // k.shape[1]
        keys, values = (x[part].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        scores = q[part].transpose(0, 1) @ keys.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~_visible(0, length, 0, window, q.device), -math.inf)
        p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        outs.append((p @ values).transpose(0, 1))
        start += length
    return torch.cat(outs)


def _visible(begin: int, end: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """bool [end - begin, end - first_key]: which keys first_key … end-1 the queries begin … end-1 may see."""
    distance = torch.arange(begin, end, device=device)[:, None] - torch.arange(first_key, end, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Saved(NamedTuple):
    """What the backward wants: the operands, and on a GPU the library's own piece of graph."""

    q: Tensor
    k: Tensor
    v: Tensor
    documents: Documents
    window: int | None
    graph: Any = None


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None,
            needs_backward: bool = True) -> tuple[Tensor, Saved]:
    """Shapes as in `reference` -> (out, what `backward` takes)."""
    if q.device.type != "cpu":
        out, graph = attention_library.forward(q, k, v, documents, window, needs_backward)
        return out, Saved(q, k, v, documents, window, graph)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, n, length in _groups(documents):
        qs, ks, vs = _heads_first(q, rows, n, k.shape[1]), _heads_first(k, rows, n), _heads_first(v, rows, n)
        result = torch.empty_like(qs)
        for begin, end, first in _blocks(length, window):
            p = _probabilities(qs, ks, begin, end, first, window)
            result[:, :, begin:end] = _split_group(torch.bmm(p, vs[:, 0, first:end]), qs)
        out[rows] = _tokens_first(result, n)
    return out, Saved(q, k, v, documents, window)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        out, saved = forward(q, k, v, documents, window)
        ctx.save_for_backward(q, k, v)
        ctx.rest = saved[3:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dout, Saved(*ctx.saved_tensors, *ctx.rest)), None, None


def differentiable(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """The op under autograd, for the composed paths: out [T, heads, head_dim]."""
    out: Tensor = _Attention.apply(q, k, v, documents, window)
    return out


def backward(dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """dout [T, heads, head_dim] -> (dq, dk, dv) with the shapes of q, k, v. Bitwise repeatable."""
    q, k, v, documents, window, graph = saved
    if graph is not None:
        return attention_library.backward(dout, graph)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, n, length in _groups(documents):
        heads = k.shape[1]
        qs, ks, vs = _heads_first(q, rows, n, heads), _heads_first(k, rows, n), _heads_first(v, rows, n)
        parts = _backward_group(_heads_first(dout, rows, n, heads), qs, ks, vs, length, window)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[rows] = _tokens_first(part, n)
    return gradients[0], gradients[1], gradients[2]


def _backward_group(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int,
                    window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one group. Scores and probabilities are formed again; dS = P·(dP - Σ P·dP) in one fused op."""
    scale = 1 / math.sqrt(q.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x[:, 0], dtype=wide) for x in (k, v))     # summed over blocks of queries
    for begin, end, first in _blocks(length, window):
        keys = slice(first, end)
        p = _probabilities(q, k, begin, end, first, window)
        upstream = dout[:, :, begin:end].flatten(1, 2)
        dp = torch.bmm(upstream, v[:, 0, keys].mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dv[:, keys] += torch.bmm(p.mT, upstream)
        dk[:, keys] += torch.bmm(ds.mT, q[:, :, begin:end].flatten(1, 2))
        dq[:, :, begin:end] = _split_group(torch.bmm(ds, k[:, 0, keys]), q)
    return dq.mul_(scale), dk.mul_(scale).to(q.dtype)[:, None], dv.to(q.dtype)[:, None]


def _probabilities(q: Tensor, k: Tensor, begin: int, end: int, first: int, window: int | None) -> Tensor:
    """softmax(q·kᵀ/√d) of the queries begin … end-1 against the keys first … end-1: [batch, group·queries, keys]."""
    group, queries = q.shape[1], end - begin
    scores = torch.bmm(q[:, :, begin:end].flatten(1, 2), k[:, 0, first:end].mT).mul_(1 / math.sqrt(q.shape[-1]))
    hidden = ~_visible(begin, end, first, window, q.device)
    scores.unflatten(1, (group, queries)).masked_fill_(hidden, -math.inf)
    return scores.softmax(-1)


def _blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first query, end of queries, first key that any of them sees)."""
    for begin in range(0, length, BLOCK):
        yield begin, min(begin + BLOCK, length), 0 if window is None else max(0, begin - window + 1)


def _groups(documents: Documents) -> Iterator[tuple[Tensor | slice, int, int]]:
    """(rows of the stream, number of documents, their length) for each length that occurs."""
    starts: dict[int, list[int]] = {}
    start = 0
    for length in documents.lengths:
        starts.setdefault(length, []).append(start)
        start += length
    for length, begins in starts.items():
        n = len(begins)
        if begins[-1] - begins[0] == (n - 1) * length:      # side by side: a view, no gathering
            yield slice(begins[0], begins[0] + n * length), n, length
        else:
            rows = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten()
            yield rows, n, length


def _heads_first(x: Tensor, rows: Tensor | slice, n: int, kv_heads: int | None = None) -> Tensor:
    """[T, heads, d] -> [n·kv_heads, group, length, d], contiguous: the heads that share a key head lie together."""
    x = x[rows]
    heads = kv_heads or x.shape[1]
    x = x.unflatten(0, (n, -1)).unflatten(2, (heads, -1))
    return x.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _tokens_first(x: Tensor, n: int) -> Tensor:
    """The way back: [n·kv_heads, group, length, d] -> [n·length, heads, d]."""
    return x.unflatten(0, (n, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _split_group(x: Tensor, q: Tensor) -> Tensor:
    """[batch, group·queries, d] -> [batch, group, queries, d]."""
    return x.unflatten(1, (q.shape[1], -1))
