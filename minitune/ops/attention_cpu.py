"""attention_cpu: attention on a CPU: in tiles, where it multiplies bf16 (csrc/attention.h); else forward torch's own
kernel, and backward, as forward where a window hides something, products over blocks of queries.

Documents of about one length are one pass of blocks; in tiles each is a task of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.ops import backends
from minitune.ops.documents import Documents

ROWS = 512
"""Rows of one product, queries times the query heads of a key head: enough for the matrix unit, few enough that the
scores stay in the cache and what lies above the diagonal is skipped block by block."""


# ---- in tiles -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def forward_tiles(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None,
                  place: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], bf16 -> (out like q, in `place` where it is given,
    log-sum-exp fp32 [heads, T])."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if place is None else place
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    torch.ops.minitune.attention_tiles(*map(_in_rows, (q, k, v)), documents.cu_seqlens, window or 0, out, lse)
    return out, lse


@torch.no_grad()
def backward_tiles(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents,
                   window: int | None, gradients: Sequence[Tensor]) -> None:
    """dout [T, heads, head_dim], operands, result and log-sum-exp of a forward -> dq, dk, dv, into `gradients`."""
    torch.ops.minitune.attention_tiles_backward(*map(_in_rows, (dout, q, k, v, out)), lse, documents.cu_seqlens,
                                              window or 0, *gradients)


def _in_rows(x: Tensor) -> Tensor:
    """x, copied if its heads or their values do not lie side by side."""
    return x if backends.side_by_side(x) else x.contiguous()


# ---- in blocks ------------------------------------------------------------------------------------------------------
def visible(begin: int, end: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """bool [end - begin, end - first_key]: which keys first_key … end-1 the queries begin … end-1 may see."""
    distance = torch.arange(begin, end, device=device)[:, None] - torch.arange(first_key, end, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@torch.no_grad()
def forward_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
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


@torch.no_grad()
def backward_blocks(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None,
                    gradients: Sequence[Tensor]) -> None:
    """dout [T, heads, head_dim] -> dq, dk, dv, into `gradients`. The probabilities are formed again."""
    heads = k.shape[1]
    for group in _groups(documents):
        qs, ks, vs = _scaled(group.take(q, heads)), group.take(k, heads), group.take(v, heads)
        upstream = group.take(dout, heads, zero_padding=True)
        for whole, part in zip(gradients, _backward_group(upstream, qs, ks, vs, group.length, window), strict=True):
            group.put(whole, group.in_rows(part))


def _backward_group(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int,
                    window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one group, q already scaled."""
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
    seen = visible(keys - queries, keys, 0, window, torch.device("cpu"))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)


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
