"""attention: Triton kernels for causal attention over a flat stream of packed documents, forward and backward.

The scheme is FlashAttention-2's (Dao 2023, arXiv:2307.08691): softmax is formed tile by tile, and the backward forms it
again from the log-sum-exp. Tiles run over the whole stream. Token i sees the keys j with first(i) <= j <= i, where
first(i) = max(starts[i], i - window + 1) never falls as i grows; so the keys that a tile of queries sees are one
stretch, its middle is seen by every row and needs no mask, and only the tiles at its two ends are masked.
Nothing is summed by atomics: dQ has a kernel of its own, and one program sums all of its dK and dV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EDGE_STAGES = tl.constexpr(2)
"""Tiles in flight in the masked loops: they are short, and a third one makes registers spill."""
LOWEST = tl.constexpr(-1e30)
"""A row's maximum before it has seen a key: finite, for the difference of two infinities is no number."""


def _config(m: int, n: int, warps: int, stages: int, registers: int, kib: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages}, warps, stages, registers, kib * 1024)


CONFIGS: dict[str, dict[int, Config]] = {
    "forward 64": {80: _config(128, 64, 8, 3, 200, 65)},
    "forward 128": {80: _config(64, 64, 4, 2, 255, 56), 89: _config(64, 64, 4, 3, 255, 88),
                    90: _config(128, 128, 8, 3, 255, 225), 100: _config(128, 64, 8, 3, 216, 129)},
    "forward 256": {80: _config(64, 32, 8, 2, 255, 68), 90: _config(128, 64, 8, 2, 255, 193),
                    100: _config(128, 32, 8, 2, 248, 129)},
    "forward fp32": {80: _config(16, 16, 8, 1, 176, 26)},
    "dq 64": {80: _config(128, 64, 8, 2, 248, 48), 90: _config(64, 64, 4, 3, 168, 73)},
    "dq 128": {80: _config(64, 64, 8, 2, 176, 72), 90: _config(128, 64, 8, 3, 232, 160),
               100: _config(128, 128, 8, 2, 248, 225)},
    "dq 256": {80: _config(32, 32, 8, 2, 128, 66), 90: _config(128, 32, 8, 2, 255, 209)},
    "dq fp32": {80: _config(16, 16, 8, 1, 176, 33)},
    "dkdv 64": {80: _config(64, 128, 8, 2, 248, 49), 90: _config(64, 64, 4, 3, 232, 82)},
    "dkdv 128": {80: _config(32, 64, 4, 2, 255, 53), 90: _config(64, 128, 8, 3, 255, 194)},
    "dkdv 256": {80: _config(32, 32, 8, 2, 208, 67), 90: _config(64, 32, 8, 2, 255, 101),
                 100: _config(32, 64, 8, 2, 160, 161)},
    "dkdv fp32": {80: _config(16, 16, 8, 1, 192, 34)},
}
"""kernel and largest head_dim, or fp32 -> generation -> configuration. What serves sm_80 fits into the 99 KiB of its
smaller relatives too."""


# ---- tiles ----------------------------------------------------------------------------------------------------------
@triton.jit
def _load(x, first, tokens, ROW: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          WHOLE: tl.constexpr):
    """The rows from `first` on, [ROWS, BLOCK_D]; 0 behind column D and, unless all rows are WHOLE, behind the end."""
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK_D)[None, :]
    at = x + tl.cast(first, tl.int64) * ROW + (row * ROW + lane)
    if not WHOLE:
        return tl.load(at, mask=(row < tokens - first) & (lane < D), other=0)
    if D < BLOCK_D:
        return tl.load(at, mask=lane < D, other=0)
    return tl.load(at)


@triton.jit
def _store(x, first, tokens, values, ROW: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK_D)[None, :]
    at = x + tl.cast(first, tl.int64) * ROW + (row * ROW + lane)
    tl.store(at, values.to(x.dtype.element_ty), mask=(row < tokens - first) & (lane < D))


@triton.jit
def _pitch(tokens):
    """Of the rows of minus_lse and minus_delta: with it, several values are loaded at once."""
    return tl.cdiv(tokens, 16) * 16


@triton.jit
def _first_seen(starts, row, tokens, window):
    """The first key that each row sees; what lies behind the end is taken for the last token."""
    row = tl.minimum(row, tokens - 1)
    return tl.maximum(tl.load(starts + row), row - window + 1)


@triton.jit
def _end_seen(ends, key, tokens, window):
    """Behind the last query that sees each key."""
    key = tl.minimum(key, tokens - 1)
    return tl.minimum(tl.load(ends + key), key + window)


@triton.jit
def _keys_of(starts, m0, tokens, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tiles of keys for the queries from m0 on: the first one, how many before the middle, the middle's start and
    end, how many masked ones in all."""
    begin = _first_seen(starts, m0, tokens, window) // BLOCK_N * BLOCK_N
    middle = tl.cdiv(_first_seen(starts, m0 + BLOCK_M - 1, tokens, window), BLOCK_N) * BLOCK_N
    behind = tl.maximum(middle, m0 // BLOCK_N * BLOCK_N)
    before = (middle - begin) // BLOCK_N
    return begin, before, middle, behind, before + _tiles(tl.minimum(m0 + BLOCK_M, tokens) - behind, BLOCK_N)


@triton.jit
def _queries_of(ends, n0, tokens, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tiles of queries for the keys from n0 on, as _keys_of gives those of keys."""
    begin = n0 // BLOCK_M * BLOCK_M
    middle = tl.cdiv(n0 + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    behind = tl.maximum(middle, _end_seen(ends, n0, tokens, window) // BLOCK_M * BLOCK_M)
    before = (middle - begin) // BLOCK_M
    return begin, before, middle, behind, before + _tiles(_end_seen(ends, n0 + BLOCK_N - 1, tokens, window) - behind,
                                                          BLOCK_M)


@triton.jit
def _tiles(length, BLOCK: tl.constexpr):
    return tl.cdiv(tl.maximum(length, 0), BLOCK)


@triton.jit
def _edge(i, begin, before, behind, BLOCK: tl.constexpr):
    """Where the i-th masked tile starts."""
    return tl.where(i < before, begin + i * BLOCK, behind + (i - before) * BLOCK)


# ---- forward --------------------------------------------------------------------------------------------------------
@triton.jit
def _attend(q, k, v, n0, m0, first, tokens, peak, total, acc, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
            D: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """One tile of keys: the running maximum (of scores in base 2), sum and weighted values of each row."""
    M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    keys = _load(k, n0, tokens, K_ROW, BLOCK_N, D, BLOCK_D, WHOLE)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if not WHOLE:
        row, key = m0 - n0 + tl.arange(0, M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        scores = tl.where((key >= (first - n0)[:, None]) & (key <= row), scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * SCALE)
    p = tl.exp2(scores * SCALE - higher[:, None])
    shrink = tl.exp2(peak - higher)
    values = _load(v, n0, tokens, V_ROW, BLOCK_N, D, BLOCK_D, WHOLE)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_forward(q, k, v, starts, out, lse, tokens, window, GROUP: tl.constexpr, Q_ROW: tl.constexpr,
                      Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr,
                      V_HEAD: tl.constexpr, OUT_ROW: tl.constexpr, OUT_HEAD: tl.constexpr, D: tl.constexpr,
                      BLOCK_D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      STAGES: tl.constexpr):
    """BLOCK_M queries of one head. The longest tiles, which are likely the last, start first."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    k += head // GROUP * K_HEAD
    v += head // GROUP * V_HEAD
    queries = _load(q + head * Q_HEAD, m0, tokens, Q_ROW, BLOCK_M, D, BLOCK_D, False)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row = m0 + tl.arange(0, BLOCK_M)
    begin, before, middle, behind, edges = _keys_of(starts, m0, tokens, window, BLOCK_M, BLOCK_N)
    first = _first_seen(starts, row, tokens, window)
    for i in tl.range(0, edges, num_stages=EDGE_STAGES):
        n0 = _edge(i, begin, before, behind, BLOCK_N)
        peak, total, acc = _attend(queries, k, v, n0, m0, first, tokens, peak, total, acc, K_ROW, V_ROW, D,
                                   SCALE * LOG2E, BLOCK_N, False)
    for n0 in tl.range(middle, behind, BLOCK_N, num_stages=STAGES):
        peak, total, acc = _attend(queries, k, v, n0, m0, row, tokens, peak, total, acc, K_ROW, V_ROW, D,
                                   SCALE * LOG2E, BLOCK_N, True)
    _store(out + head * OUT_HEAD, m0, tokens, acc / total[:, None], OUT_ROW, BLOCK_M, D, BLOCK_D)
    tl.store(lse + head * tokens + row, peak * LN2 + tl.log(total), mask=row < tokens)


# ---- backward -------------------------------------------------------------------------------------------------------
@triton.jit
def _add_dq(q, dout, k, v, n0, m0, first, tokens, lse, delta, acc, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
            D: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """What one tile of keys adds to dQ / scale; lse in base 2."""
    M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    keys = _load(k, n0, tokens, K_ROW, BLOCK_N, D, BLOCK_D, WHOLE)
    values = _load(v, n0, tokens, V_ROW, BLOCK_N, D, BLOCK_D, WHOLE)
    p = tl.exp2(tl.dot(q, tl.trans(keys), input_precision="ieee") * SCALE - lse[:, None])
    if not WHOLE:
        row, key = m0 - n0 + tl.arange(0, M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        p = tl.where((key >= (first - n0)[:, None]) & (key <= row), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_dq(dout, q, k, v, out, lse, starts, minus_lse, minus_delta, dq, tokens, window, GROUP: tl.constexpr,
                 DOUT_ROW: tl.constexpr, DOUT_HEAD: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
                 K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
                 OUT_ROW: tl.constexpr, OUT_HEAD: tl.constexpr, DQ_ROW: tl.constexpr, DQ_HEAD: tl.constexpr,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """dQ of BLOCK_M queries of one head. On the way, for dK and dV: -lse / scale and -delta of each row, where delta =
    Σ dout·out; 0 behind the end, up to a multiple of 16."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    k += head // GROUP * K_HEAD
    v += head // GROUP * V_HEAD
    upstream = _load(dout + head * DOUT_HEAD, m0, tokens, DOUT_ROW, BLOCK_M, D, BLOCK_D, False)
    result = _load(out + head * OUT_HEAD, m0, tokens, OUT_ROW, BLOCK_M, D, BLOCK_D, False)
    row = m0 + tl.arange(0, BLOCK_M)
    row_lse = tl.load(lse + head * tokens + row, mask=row < tokens, other=0)
    row_delta = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    pitch = _pitch(tokens)
    tl.store(minus_lse + head * pitch + row, row_lse * (-1 / SCALE), mask=row < pitch)
    tl.store(minus_delta + head * pitch + row, -row_delta, mask=row < pitch)
    row_lse *= LOG2E
    queries = _load(q + head * Q_HEAD, m0, tokens, Q_ROW, BLOCK_M, D, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, before, middle, behind, edges = _keys_of(starts, m0, tokens, window, BLOCK_M, BLOCK_N)
    first = _first_seen(starts, row, tokens, window)
    for i in tl.range(0, edges, num_stages=EDGE_STAGES):
        n0 = _edge(i, begin, before, behind, BLOCK_N)
        acc = _add_dq(queries, upstream, k, v, n0, m0, first, tokens, row_lse, row_delta, acc, K_ROW, V_ROW, D,
                      SCALE * LOG2E, BLOCK_N, False)
    for n0 in tl.range(middle, behind, BLOCK_N, num_stages=STAGES):
        acc = _add_dq(queries, upstream, k, v, n0, m0, row, tokens, row_lse, row_delta, acc, K_ROW, V_ROW, D,
                      SCALE * LOG2E, BLOCK_N, True)
    _store(dq + head * DQ_HEAD, m0, tokens, acc * SCALE, DQ_ROW, BLOCK_M, D, BLOCK_D)


@triton.jit
def _columns(statistic, head, m0, tokens, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, BLOCK_M]: the values of the queries from m0 on, the same in every row."""
    at = tl.arange(0, BLOCK_M)
    statistic += head * _pitch(tokens) + m0
    values = tl.load(statistic + at) if WHOLE else tl.load(statistic + at, mask=at < _pitch(tokens) - m0, other=0)
    return tl.broadcast_to(values[None, :], [ROWS, BLOCK_M])


@triton.jit
def _add_dk_dv(keys, values, q, dout, minus_lse, minus_delta, head, m0, n0, end, tokens, dk, dv, Q_ROW: tl.constexpr,
               Q_HEAD: tl.constexpr, DOUT_ROW: tl.constexpr, DOUT_HEAD: tl.constexpr, D: tl.constexpr,
               SCALE: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """What one tile of queries of one head adds to dK / scale and dV. Scores lie as [keys, queries]: so every product
    finds its left operand in registers or as it lies in memory. -lse / scale and -delta are what the sums of products
    start from: so they take no registers of their own, which are what is short here."""
    N: tl.constexpr = keys.shape[0]
    BLOCK_D: tl.constexpr = keys.shape[1]
    queries = _load(q + head * Q_HEAD, m0, tokens, Q_ROW, BLOCK_M, D, BLOCK_D, WHOLE)
    upstream = _load(dout + head * DOUT_HEAD, m0, tokens, DOUT_ROW, BLOCK_M, D, BLOCK_D, WHOLE)
    row = m0 + tl.arange(0, BLOCK_M)
    scores = tl.dot(keys, tl.trans(queries), _columns(minus_lse, head, m0, tokens, N, BLOCK_M, WHOLE),
                    input_precision="ieee")
    p = tl.exp2(scores * SCALE)
    if not WHOLE:
        key = n0 + tl.arange(0, N)[:, None]
        p = tl.where((row[None, :] >= key) & (row[None, :] < end[:, None]), p, 0.0)
    dv = tl.dot(p.to(upstream.dtype), upstream, dv, input_precision="ieee")
    ds = p * tl.dot(values, tl.trans(upstream), _columns(minus_delta, head, m0, tokens, N, BLOCK_M, WHOLE),
                    input_precision="ieee")
    return tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["tokens", "window"])
def attention_dkdv(dout, q, k, v, minus_lse, minus_delta, ends, dk, dv, tokens, window, GROUP: tl.constexpr,
                   DOUT_ROW: tl.constexpr, DOUT_HEAD: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
                   K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
                   DK_ROW: tl.constexpr, DK_HEAD: tl.constexpr, DV_ROW: tl.constexpr, DV_HEAD: tl.constexpr,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """dK and dV of BLOCK_N keys of one key head: over the queries that see them, for each the GROUP heads in turn."""
    n0 = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    keys = _load(k + kv_head * K_HEAD, n0, tokens, K_ROW, BLOCK_N, D, BLOCK_D, False)
    values = _load(v + kv_head * V_HEAD, n0, tokens, V_ROW, BLOCK_N, D, BLOCK_D, False)
    q += kv_head * (GROUP * Q_HEAD)
    dout += kv_head * (GROUP * DOUT_HEAD)
    minus_lse += kv_head * GROUP * _pitch(tokens)
    minus_delta += kv_head * GROUP * _pitch(tokens)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, before, middle, behind, edges = _queries_of(ends, n0, tokens, window, BLOCK_M, BLOCK_N)
    end = _end_seen(ends, n0 + tl.arange(0, BLOCK_N), tokens, window)
    for i in tl.range(0, edges * GROUP, num_stages=EDGE_STAGES):
        head, m0 = i % GROUP, _edge(i // GROUP, begin, before, behind, BLOCK_M)
        dk_acc, dv_acc = _add_dk_dv(keys, values, q, dout, minus_lse, minus_delta, head, m0, n0, end, tokens,
                                    dk_acc, dv_acc, Q_ROW, Q_HEAD, DOUT_ROW, DOUT_HEAD, D, SCALE * LOG2E, BLOCK_M,
                                    False)
    for i in tl.range(0, (behind - middle) // BLOCK_M * GROUP, num_stages=STAGES):
        head, m0 = i % GROUP, middle + i // GROUP * BLOCK_M
        dk_acc, dv_acc = _add_dk_dv(keys, values, q, dout, minus_lse, minus_delta, head, m0, n0, end, tokens,
                                    dk_acc, dv_acc, Q_ROW, Q_HEAD, DOUT_ROW, DOUT_HEAD, D, SCALE * LOG2E, BLOCK_M,
                                    True)
    _store(dk + kv_head * DK_HEAD, n0, tokens, dk_acc * SCALE, DK_ROW, BLOCK_N, D, BLOCK_D)
    _store(dv + kv_head * DV_HEAD, n0, tokens, dv_acc, DV_ROW, BLOCK_N, D, BLOCK_D)


# ---- launchers ------------------------------------------------------------------------------------------------------
def _config_of(kernel: str, q: Tensor) -> Config:
    size = "fp32" if q.dtype == torch.float32 else str(min(size for size in (64, 128, 256) if q.shape[2] <= size))
    return pick(CONFIGS[f"{kernel} {size}"], q.device)


def _sizes(q: Tensor, k: Tensor, **tensors: Tensor) -> dict[str, int | float]:
    """What is constant in a model: sizes, and the pitch of rows and heads of each tensor [T, heads, D]."""
    D = q.shape[2]
    sizes = {"GROUP": q.shape[1] // k.shape[1], "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)),
             "SCALE": D ** -0.5}
    for name, x in {"Q": q, "K": k, **tensors}.items():
        sizes |= {f"{name}_ROW": x.stride(0), f"{name}_HEAD": x.stride(1)}
    return sizes


def _window(window: int | None, tokens: int) -> int:
    """No window is one of all tokens."""
    return tokens if window is None else min(window, tokens)


def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None, *, out: Tensor | None = None,
            config: Config | None = None) -> tuple[Tensor, Tensor]:
    """q [T, heads, D], k and v [T, kv_heads, D], fp32, fp16 or bf16, D <= 256, each row of D contiguous; starts int32
    [T]: the first token of each token's document -> (out [T, heads, D], lse fp32 [heads, T], in base e)."""
    tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    config = config or _config_of("forward", q)
    with torch.cuda.device_of(q):
        if tokens:
            attention_forward[(triton.cdiv(tokens, config.tiles["BLOCK_M"]), heads)](
                q, k, v, starts, out, lse, tokens, _window(window, tokens), **_sizes(q, k, V=v, OUT=out),
                **config.arguments())
    return out, lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor,
             window: int | None, *, gradients: tuple[Tensor, Tensor, Tensor] | None = None,
             dq_config: Config | None = None, dkdv_config: Config | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dout like `out`, what `forward` took and gave, and ends int32 [T]: behind the last token of each token's document
    -> (dq, dk, dv), written into `gradients` where these are given. Bitwise repeatable."""
    tokens, heads, _ = q.shape
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dq, dk, dv = gradients or [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    minus_lse, minus_delta = torch.empty(2, heads, triton.cdiv(tokens, 16) * 16, dtype=torch.float32, device=q.device)
    dq_config, dkdv_config = dq_config or _config_of("dq", q), dkdv_config or _config_of("dkdv", q)
    with torch.cuda.device_of(q):
        if tokens:
            attention_dq[(triton.cdiv(tokens, dq_config.tiles["BLOCK_M"]), heads)](
                dout, q, k, v, out, lse, starts, minus_lse, minus_delta, dq, tokens, _window(window, tokens),
                **_sizes(q, k, V=v, DOUT=dout, OUT=out, DQ=dq), **dq_config.arguments())
            attention_dkdv[(triton.cdiv(tokens, dkdv_config.tiles["BLOCK_N"]), k.shape[1])](
                dout, q, k, v, minus_lse, minus_delta, ends, dk, dv, tokens, _window(window, tokens),
                **_sizes(q, k, V=v, DOUT=dout, DK=dk, DV=dv), **dkdv_config.arguments())
    return dq, dk, dv
