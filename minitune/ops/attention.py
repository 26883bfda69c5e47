"""attention: causal, grouped-query, within each document of a flat packed stream, optionally in a sliding window.

On a CPU one pass for each group of documents of about one length: forward torch's own kernel; backward, and forward
where a window hides something, matrix products over blocks of queries. On a GPU torch's own kernels
(`attention_library`) or our Triton kernel, for the forward and for the backward whichever was measured to be the
fastest; what goes from one to the other is the log-sum-exp. `reference` is what all must equal.

Every backward is repeatable to the bit but one, cuDNN's: it is taken only where "cudnn" is asked for by name
(MINITUNE_BACKEND=cudnn, `backends.use("cudnn")`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.ops import attention_library, backends, tuned
from minitune.ops.documents import Documents

ROWS = 512
"""Rows of one product, queries times the query heads of a key head: enough for the matrix unit, few enough that the
scores stay in the cache and what lies above the diagonal is skipped block by block."""


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
    """What the backward wants: the operands, and on a GPU the result and its log-sum-exp fp32 [heads, T], or the
    library's own piece of graph."""

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
    """Shapes as in `reference` -> (out, what `backward` takes). Our kernel writes into `rows` [T, heads·head_dim] where
    they are given; the other ways have memory of their own."""
    way = forward_way(q, k, documents, window)
    if way == "triton":
        place = None if rows is None else rows.unflatten(-1, (-1, q.shape[2]))
        out, lse = backends.kernel("attention").forward(q, k, v, documents.spans[0], window, out=place)
        return out, Saved(q, k, v, documents, window, None, out, lse)
    if way in ("flash", "cudnn"):
        out, lse = (attention_library.cudnn_forward(q, k, v, documents) if way == "cudnn" else
                    attention_library.flash_forward(q, k, v, documents, window))
        return out, Saved(q, k, v, documents, window, None, out, lse)
    if way != "blocks":
        out, graph = attention_library.forward(q, k, v, documents, window, needs_backward, way == "cudnn graph")
        return out, Saved(q, k, v, documents, window, graph)
    return _on_cpu(q, k, v, documents, window), Saved(q, k, v, documents, window)


def forward_way(q: Tensor, k: Tensor, documents: Documents, window: int | None) -> str:
    """What `forward` takes: "blocks" on a CPU; on a GPU "triton"; "flash"; "cudnn", whose backward another does; "cudnn
    graph", by autograd there and back, where it was asked for; "documents", plain products for each by itself."""
    fits = attention_library.cudnn(q, documents, window)
    chosen = _chosen("forward", q, k, documents.max_seqlen, window, but=() if fits else ("cudnn",),
                     unmeasured=() if fits and documents.n_equal is not None else ("cudnn",))
    if chosen == "cudnn" and backends.asked() == "cudnn":
        return "cudnn graph"
    return _library(q, window) if chosen == "reference" else chosen


def backward_way(q: Tensor, k: Tensor, longest: int, window: int | None) -> str:
    """What `backward` takes of a forward that gave a log-sum-exp: "triton" or "flash"."""
    chosen = "reference" if q.device.type == "cpu" else _chosen("backward", q, k, longest, window, ("cudnn",))
    return "flash" if chosen == "reference" and attention_library.flash(q, window) else "triton"


def _library(q: Tensor, window: int | None) -> str:
    if q.device.type == "cpu":
        return "blocks"
    return "flash" if attention_library.flash(q, window) else "documents"


def _chosen(step: str, q: Tensor, k: Tensor, longest: int, window: int | None, but: tuple[str, ...],
            unmeasured: tuple[str, ...] = ()) -> str:
    """triton, cudnn, or reference for the library's way: the one that was asked for, unless it is in `but`; triton
    where FlashAttention does not take it; what was measured to be faster with these heads and this longest document,
    unless it is in `unmeasured`; the library."""
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
    @once_differentiable
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
    if out is None or lse is None or backward_way(q, k, documents.max_seqlen, window) == "triton":
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
    if lse is not None:
        backends.kernel("attention").backward(dout, q, k, v, out, lse, *documents.spans, window,
                                              gradients=parts)
        return
    for group in _groups(documents):
        heads = k.shape[1]
        qs, ks, vs = _scaled(group.take(q, heads)), group.take(k, heads), group.take(v, heads)
        upstream = group.take(dout, heads, zero_padding=True)
        for whole, part in zip(parts, _backward_group(upstream, qs, ks, vs, group.length, window), strict=True):
            group.put(whole, group.in_rows(part))


# ---- on a CPU -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def _on_cpu(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Shapes as in `reference`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in _groups(documents):
        if window is None or window >= group.length:
            qs, ks, vs = (group.batched(x) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            group.put(out, attended.transpose(1, 2).flatten(0, 1))
            continue
        heads = k.shape[1]
        qs, ks, vs = _scaled(group.take(q, heads)), group.take(k, heads), group.take(v, heads)
        result = torch.empty_like(qs)
        for begin, end, first in _blocks(group.length, window, qs.shape[1]):
            p = _probabilities(qs, _keys(ks, first, end), begin, first, window)
            result[:, :, begin:end] = _split_group(torch.bmm(p, _keys(vs, first, end)), qs)
        group.put(out, group.in_rows(result))
    return out


def _backward_group(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int,
                    window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one group, q already scaled. The probabilities are formed again."""
    dq = torch.empty_like(q)
    dk, dv = (_Sum(x[:, 0]) for x in (k, v))
    for begin, end, first in reversed(list(_blocks(length, window, q.shape[1]))):   # the widest range of keys first
        seen = _keys(k, first, end)
        p = _probabilities(q, seen, begin, first, window)
        upstream = dout[:, :, begin:end].flatten(1, 2)
        dp = torch.bmm(upstream, _keys(v, first, end).mT)
        ds = _through_softmax(dp, p)
        dv.add(first, end, torch.bmm(p.mT, upstream))
        dk.add(first, end, torch.bmm(ds.mT, q[:, :, begin:end].flatten(1, 2)))
        dq[:, :, begin:end] = _split_group(torch.bmm(ds, seen), q)
    return _scaled(dq), dk.total()[:, None], dv.total()[:, None]


class _Sum:
    """A sum over blocks of queries, [batch, length, d] like `like`, in fp32; where there is one block alone, it is
    that block's result as it came."""

    def __init__(self, like: Tensor):
        self.like = like
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.value: Tensor | None = None

    def add(self, first: int, end: int, part: Tensor) -> None:
        """Add `part` to the positions first … end-1."""
        if self.value is None and part.shape == self.like.shape:
            self.value = part
            return
        if self.value is None:
            self.value = torch.zeros(self.like.shape, dtype=self.wide, device=part.device)
        self.value = self.value.to(self.wide)
        self.value[:, first:end] += part

    def total(self) -> Tensor:
        assert self.value is not None
        return self.value.to(self.like.dtype)


def _keys(k: Tensor, first: int, end: int) -> Tensor:
    """The keys (or values) first … end-1 as a packed [batch, keys, d]: bmm would copy a slice itself, and where it
    wants the transpose it would do so element by element."""
    return k[:, 0, first:end].contiguous()


def _probabilities(q: Tensor, seen: Tensor, begin: int, first: int, window: int | None) -> Tensor:
    """softmax(q·kᵀ), q already scaled, of the queries begin … end-1 against the keys first … end-1 in `seen`, as
    [batch, group·queries, keys]. Hidden keys get -inf added, which is cheaper than masked_fill_."""
    end = first + seen.shape[1]
    scores = torch.bmm(q[:, :, begin:end].flatten(1, 2), seen.mT)
    if backends.by_rows("softmax", scores):
        torch.ops.minitune.rows_softmax(scores.flatten(0, 1), end - begin, begin - first, window or 0)
        return scores
    masked = first if window is not None else begin     # without a window all queries see the keys before `begin`
    _split_group(scores, q)[..., masked - first :].add_(_mask(end - begin, end - masked, window, q.dtype))
    return scores.softmax(-1)


def _through_softmax(dp: Tensor, p: Tensor) -> Tensor:
    """The gradient of the scores, p·(dp - Σ p·dp); it may take the place of dp."""
    if backends.by_rows("softmax", dp):
        torch.ops.minitune.rows_softmax_backward(dp.flatten(0, 1), p.flatten(0, 1))
        return dp
    return torch._softmax_backward_data(dp, p, -1, p.dtype)


@functools.lru_cache(maxsize=64)
def _mask(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[queries, keys]: 0 where one of the last `queries` positions sees one of the last `keys`, else -inf."""
    visible = _visible(keys - queries, keys, 0, window, torch.device("cpu"))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)


def _scaled(q: Tensor) -> Tensor:
    """q/√d in place: one pass over q instead of one over all scores."""
    return q.mul_(1 / math.sqrt(q.shape[-1]))


def _blocks(length: int, window: int | None, group: int) -> Iterator[tuple[int, int, int]]:
    """(first query, end of queries, first key that any of them sees), for `group` query heads a key head."""
    size = max(64, min(ROWS // group, length // 2))
    for begin in range(0, length, size):
        yield begin, min(begin + size, length), 0 if window is None else max(0, begin - window + 1)


class _Group(NamedTuple):
    """Documents of about one length that are worked on together, the shorter ones padded behind their end.

    Padding needs no mask: it lies after every true position, where a causal query does not look, and what padded
    queries give is dropped.
    """

    rows: Tensor | slice        # n · length rows of the stream
    n: int
    length: int
    valid: Tensor | None        # bool [n · length], None without padding

    def take(self, x: Tensor, kv_heads: int, zero_padding: bool = False) -> Tensor:
        """[T, heads, d] -> [n·kv_heads, heads / kv_heads, length, d], a fresh copy: heads of one key head together."""
        x = x[self.rows]
        if zero_padding and self.valid is not None:
            x = x.masked_fill(~self.valid[:, None, None], 0)
        x = x.unflatten(0, (self.n, -1)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return x.clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def batched(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [n, heads, length, d]; a view where the documents lie side by side."""
        return x[self.rows].unflatten(0, (self.n, -1)).transpose(1, 2)

    def in_rows(self, x: Tensor) -> Tensor:
        """The way back from `take`: [n·kv_heads, group, length, d] -> [n · length, heads, d]."""
        return x.unflatten(0, (self.n, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

    def put(self, target: Tensor, x: Tensor) -> None:
        """x [n · length, heads, d] into the group's rows of target [T, heads, d]."""
        if self.valid is None or isinstance(self.rows, slice):
            target[self.rows] = x
        else:
            target[self.rows[self.valid]] = x[self.valid]


@functools.lru_cache(maxsize=8)
def _groups(documents: Documents) -> list[_Group]:
    """Documents shorter than 1024 share a group where their lengths round up to the same multiple of 16 (of an eighth
    of themselves if that is more): a few passes for a stream of many short documents."""
    found = []
    groups: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in documents.lengths:
        if not length:      # what pads a batch to a fixed number of documents
            continue
        grain = 1 << max(4, length.bit_length() - 4) if length < 1024 else 1
        groups.setdefault(-(-length // grain) * grain, []).append((start, length))
        start += length
    for members in groups.values():
        n, longest = len(members), max(length for _, length in members)
        begins = [begin for begin, _ in members]
        equal = all(length == longest for _, length in members)
        if equal and begins[-1] - begins[0] == (n - 1) * longest:      # side by side: a view, no gathering
            found.append(_Group(slice(begins[0], begins[0] + n * longest), n, longest, None))
            continue
        places = torch.arange(longest)
        rows = torch.tensor(begins)[:, None] + places
        valid = places < torch.tensor([length for _, length in members])[:, None]
        rows = torch.where(valid, rows, rows[:, :1])
        found.append(_Group(rows.flatten(), n, longest, None if equal else valid.flatten()))
    return found


def _split_group(x: Tensor, q: Tensor) -> Tensor:
    """[batch, group·queries, d] -> [batch, group, queries, d]."""
    return x.unflatten(1, (q.shape[1], -1))
