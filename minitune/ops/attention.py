"""attention: causal, grouped-query, within each document of a flat packed stream, optionally in a sliding window.

On a CPU in tiles, or by matrix products over blocks of queries (`attention_cpu`). On a GPU torch's
own kernels (`attention_library`) or our Triton kernel, for the forward and for the backward whichever was measured to
be the fastest; what goes from one to the other is the log-sum-exp. `reference` is what all must equal.

Every backward is repeatable to the bit but one, cuDNN's: it is taken only where "cudnn" is asked for by name
(MINITUNE_BACKEND=cudnn, `backends.use("cudnn")`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.ops import attention_cpu, attention_library, backends, tuned
from minitune.ops.documents import Documents
from minitune.ops.once import once


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
        scores = scores.masked_fill(~attention_cpu.visible(0, length, 0, window, q.device), -math.inf)
        p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        outs.append((p @ values).transpose(0, 1))
        start += length
    return torch.cat(outs)


class Saved(NamedTuple):
    """What the backward wants: the operands, and the result and its log-sum-exp fp32 [heads, T], the library's own
    piece of graph, or neither."""

    q: Tensor
    k: Tensor
    v: Tensor
    documents: Documents
    window: int | None
    graph: Any = None
    out: Tensor | None = None
    lse: Tensor | None = None


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None,
            needs_backward: bool = True, rows: Tensor | None = None) -> tuple[Tensor, Saved]:
    """Shapes as in `reference` -> (out, what `backward` takes). Our kernels write into `rows` [T, heads·head_dim] where
    they are given; the other ways have memory of their own."""
    way = forward_way(q, k, documents, window)
    place = None if rows is None else rows.unflatten(-1, (-1, q.shape[2]))
    if way == "triton":
        from minitune.kernels import attention as kernel

        out, lse = kernel.forward(q, k, v, documents.spans[0], window, out=place)
        return out, Saved(q, k, v, documents, window, None, out, lse)
    if way == "native":
        out, lse = attention_cpu.forward_tiles(q, k, v, documents, window, place)
        return out, Saved(q, k, v, documents, window, None, out, lse)
    if way in ("flash", "cudnn"):
        out, lse = (attention_library.cudnn_forward(q, k, v, documents) if way == "cudnn" else
                    attention_library.flash_forward(q, k, v, documents, window))
        return out, Saved(q, k, v, documents, window, None, out, lse)
    if way != "blocks":
        out, graph = attention_library.forward(q, k, v, documents, window, needs_backward, way == "cudnn graph")
        return out, Saved(q, k, v, documents, window, graph)
    return attention_cpu.forward_blocks(q, k, v, documents, window), Saved(q, k, v, documents, window)


def forward_way(q: Tensor, k: Tensor, documents: Documents, window: int | None) -> str:
    """What `forward` takes: on a CPU "native", in tiles, or "blocks"; on a GPU "triton"; "flash"; "cudnn", whose
    backward another does; "cudnn graph", by autograd there and back, where it was asked for; "documents", plain
    products for each by itself."""
    fits = attention_library.cudnn(q, documents, window)
    chosen = _chosen("forward", q, k, documents.max_seqlen, window, but=() if fits else ("cudnn",),
                     unmeasured=() if fits and documents.n_equal is not None else ("cudnn",))
    if chosen == "cudnn" and backends.asked() == "cudnn":
        return "cudnn graph"
    return _library(q, window) if chosen == "reference" else chosen


def backward_way(q: Tensor, k: Tensor, longest: int, window: int | None) -> str:
    """What `backward` takes of a forward that gave a log-sum-exp: "native" or "blocks" (CPU), "triton" or "flash"."""
    chosen = _chosen("backward", q, k, longest, window, ("cudnn",))
    if q.device.type == "cpu":
        return "blocks" if chosen == "reference" else chosen
    return "flash" if chosen == "reference" and attention_library.flash(q, window) else "triton"


def _library(q: Tensor, window: int | None) -> str:
    if q.device.type == "cpu":
        return "blocks"
    return "flash" if attention_library.flash(q, window) else "documents"


def _chosen(step: str, q: Tensor, k: Tensor, longest: int, window: int | None, but: tuple[str, ...],
            unmeasured: tuple[str, ...] = ()) -> str:
    """native, triton, cudnn, or reference for the library's way: the one that was asked for, unless it is in `but`;
    native on a CPU with tiles; triton where FlashAttention does not take it; what was measured to be faster with these
    heads and this longest document, unless it is in `unmeasured`; the library."""
    measured = tuned.way(f"attention {step}", (q.shape[1], k.shape[1], q.shape[2], longest), q.device, q.dtype,
                         without=unmeasured)
    if q.device.type == "cuda" and q.shape[2] <= 256 and not attention_library.flash(q, window):
        measured = "triton"
    return backends.choose("attention", q.device, measured, q.dtype, but)


def reads_lengths(q: Tensor, k: Tensor, longest: int, window: int | None) -> bool:
    """Whether the way that is taken goes by the documents' lengths on the host, not by tensors on the device alone."""
    unknown = Documents(torch.empty(0, dtype=torch.int32), (longest,), exact=False)
    return forward_way(q, k, unknown, window) in ("blocks", "documents")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
        out, saved = forward(q, k, v, documents, window)
        ctx.save_for_backward(q, k, v, saved.out, saved.lse)
        ctx.rest = documents, window, saved.graph
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        documents, window, graph = ctx.rest
        gradient = q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        backward(dout.contiguous(), Saved(q, k, v, documents, window, graph, out, lse), gradient, again)
        if not again:
            ctx.rest = documents, window, None      # a loss that is still referenced must not keep it alive
        return *gradient.split((q.shape[1], k.shape[1], k.shape[1]), dim=1), None, None


def differentiable(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """The op under autograd, for the composed paths: out [T, heads, head_dim]."""
    out: Tensor = _Attention.apply(q, k, v, documents, window)
    return out


def backward_apart(dout: Tensor, saved: Saved, keep_graph: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """dout [T, heads, head_dim] -> dq, dk, dv each in memory of its own, where the library makes them so. Else None:
    `backward` is to be asked."""
    q, k, v, documents, window, graph, out, lse = saved
    if graph is not None:
        return attention_library.backward(dout, graph, keep_graph)
    if out is None or lse is None or backward_way(q, k, documents.max_seqlen, window) != "flash":
        return None
    return attention_library.flash_backward(dout, q, k, v, out, lse, documents, window)


def backward(dout: Tensor, saved: Saved, gradient: Tensor, keep_graph: bool = False) -> None:
    """dout [T, heads, head_dim] -> dq, dk, dv side by side in `gradient` [T, heads + 2·kv_heads, head_dim], whose rows
    may lie apart. Bitwise repeatable. With `keep_graph` it can be asked once more."""
    q, k, v, documents, window, _, out, lse = saved
    parts = gradient.split((q.shape[1], k.shape[1], k.shape[1]), dim=1)
    found = backward_apart(dout, saved, keep_graph)
    if found is not None:
        for part, value in zip(parts, found, strict=True):
            part.copy_(value)
        return
    way = backward_way(q, k, documents.max_seqlen, window)
    if out is None or lse is None or way == "blocks":
        attention_cpu.backward_blocks(dout, q, k, v, documents, window, parts)
    elif way == "native":
        attention_cpu.backward_tiles(dout, q, k, v, out, lse, documents, window, parts)
    else:
        from minitune.kernels import attention as kernel

        kernel.backward(dout, q, k, v, out, lse, *documents.spans, window, gradients=parts)
