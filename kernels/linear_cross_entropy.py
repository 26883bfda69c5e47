"""linear_cross_entropy: Triton kernels: a chunk's logits into losses and, in place, their gradients; rows weighed.

The head's two products are the library's; what lies between them is bound by memory, and at best reads and writes each
logit once. A row is swept twice, so it should still be in the L2 cache the second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

GROUP = tl.constexpr(8)
"""Logits that one thread holds beside each other: their maximum needs no other thread, and 16 bits wide they are one
load of 128 bits."""
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where the maximum starts: finite, so that a logit of -inf adds exp(-inf) = 0 and not NaN."""
LONG = 40_000
"""Rows with more logits take 32 warps: fewer of them at a time, so that more of each stays in the L2 cache. At 16 warps
and 32 registers an H100 works on 528 rows, at 32,000 logits 34 MB of its 50."""

CONFIGS: dict[str, dict[int, Config]] = {
    "losses": {80: Config({"TILE": 8192}, num_warps=16, registers=64, shared=4096)},
    "losses_long": {80: Config({"TILE": 16384}, num_warps=32, registers=64, shared=8192)},
    "losses_narrow": {80: Config({"TILE": 2048}, num_warps=16, registers=40, shared=1024)},      # rows not aligned
    "weigh": {80: Config({"TILE": 1024}, num_warps=4, registers=32)},
}


@triton.jit
def _take(x, origin, live, peak, total, distance, SMOOTH: tl.constexpr):
    """Add a tile x [TILE / GROUP, GROUP] to the running maximum and sum of each group (Milakov and Gimelshein 2018)."""
    above = tl.maximum(peak, tl.max(x, axis=1))
    total = total * tl.exp2((peak - above) * LOG2E) + tl.sum(tl.exp2((x - above[:, None]) * LOG2E), axis=1)
    if SMOOTH:
        distance += tl.where(live, tl.sum(x - origin, axis=1), 0.0)
    return above, total, distance


@triton.jit
def _gradient(x, column, label, peak, inverse, smoothing, share, SMOOTH: tl.constexpr):
    gradient = tl.exp2((x - peak) * LOG2E) * inverse - tl.where(column == label, 1 - smoothing, 0.0)
    return gradient - share if SMOOTH else gradient


@triton.jit
def linear_cross_entropy_losses(logits, labels, losses, pitch, V, smoothing, GRADIENT: tl.constexpr,
                                SMOOTH: tl.constexpr, RAGGED: tl.constexpr, TILE: tl.constexpr):
    """One row: whole groups tile by tile; of a RAGGED row the rest, fewer than GROUP, go to the first groups' sums.

    Differences from the maximum and from the label's logit are exact where logits are large and close.
    """
    GROUPS: tl.constexpr = TILE // GROUP
    tl.static_assert(GROUPS >= GROUP, "the rest of a ragged row needs a group for each of its logits")
    row = logits + tl.program_id(0).to(tl.int64) * pitch
    label = tl.load(labels + tl.program_id(0))
    inside = (label >= 0) & (label < V)
    own = tl.load(row + tl.where(inside, label, 0), mask=inside, other=float("nan")).to(tl.float32)
    origin = tl.where(own == float("-inf"), 0.0, own)
    first = tl.arange(0, GROUPS) * GROUP
    lane = first[:, None] + tl.arange(0, GROUP)[None, :]
    whole = V // GROUP * GROUP
    peak = tl.full([GROUPS], LOWEST, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    distance = tl.zeros([GROUPS], tl.float32)
    if RAGGED:
        rest = whole + tl.arange(0, GROUPS)
        few = tl.load(row + rest, mask=rest < V, other=float("-inf")).to(tl.float32)
        peak, total, distance = _take(few[:, None], origin, rest < V, peak, total, distance, SMOOTH)
    for start in range(0, whole, TILE):
        live = first < whole - start        # one mask for a whole group keeps loads wide
        x = tl.load(row + start + lane, mask=live[:, None], other=float("-inf")).to(tl.float32)
        peak, total, distance = _take(x, origin, live, peak, total, distance, SMOOTH)
    highest = tl.max(peak, axis=0)
    total = tl.sum(total * tl.exp2((peak - highest) * LOG2E), axis=0)
    loss = highest - own + tl.log(total)
    if SMOOTH:      # (1 - ε)·nll + ε·mean of -log p, put together
        loss -= smoothing * tl.div_rn(tl.sum(distance, axis=0), tl.cast(V, tl.float32))
    tl.store(losses + tl.program_id(0), loss)
    if GRADIENT:
        place = tl.where(inside, label, -1).to(tl.int32)
        share = tl.div_rn(tl.cast(smoothing, tl.float32), tl.cast(V, tl.float32))      # ε / V, of every logit
        inverse = tl.where(inside, tl.div_rn(1.0, total), float("nan"))
        if RAGGED:
            rest = whole + tl.arange(0, GROUPS)
            few = tl.load(row + rest, mask=rest < V, other=float("-inf")).to(tl.float32)
            few = _gradient(few, rest, place, highest, inverse, smoothing, share, SMOOTH)
            tl.store(row + rest, few.to(logits.dtype.element_ty), mask=rest < V)
        for done in range(0, whole, TILE):      # backwards: what was read last is the likeliest to be in the cache
            start = (whole - 1) // TILE * TILE - done
            at, live = row + start + lane, (first < whole - start)[:, None]
            x = tl.load(at, mask=live, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            x = _gradient(x, start + lane, place, highest, inverse, smoothing, share, SMOOTH)
            tl.store(at, x.to(logits.dtype.element_ty), mask=live, eviction_policy="evict_first")


def losses_(logits: Tensor, labels: Tensor, losses: Tensor, *, smoothing: float = 0.0, gradient: bool,
            config: Config | None = None) -> None:
    """logits [n, V] (bf16, fp16 or fp32; rows contiguous, they may lie apart), labels int64 [n] -> losses fp32 [n].

    With p = softmax(logits[i]) and ε = smoothing, losses[i] = (1 - ε)·(-log p[label]) + ε·mean(-log p) (Szegedy et al.
    2016), and with `gradient` logits[i] becomes p - (1 - ε)·onehot(label) - ε/V. A label outside [0, V) reads and
    writes nothing out of bounds: its loss is NaN, and so is its row of gradients.
    """
    n, V = logits.shape
    assert logits.stride(1) == 1 and labels.is_contiguous() and losses.is_contiguous()
    if n == 0:
        return
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0      # else loads are of one logit each
    kind = "losses_narrow" if not aligned else "losses_long" if V > LONG else "losses"
    config = config or pick(CONFIGS[kind], logits.device)
    with torch.cuda.device_of(logits):
        linear_cross_entropy_losses[(n,)](logits, labels, losses, logits.stride(0), V, float(smoothing),
                                          GRADIENT=gradient, SMOOTH=smoothing != 0,
                                          RAGGED=V % GROUP.value != 0, **config.arguments())


@triton.jit(do_not_specialize=["step"])
def linear_cross_entropy_weigh(x, weights, out, step, pitch, D: tl.constexpr, TILE: tl.constexpr):
    """TILE values of a row."""
    PIECES: tl.constexpr = (D + TILE - 1) // TILE
    row = tl.program_id(0) // PIECES
    column = (tl.program_id(0) - row * PIECES) * TILE + tl.arange(0, TILE)
    weight = tl.load(weights + row * step)
    values = tl.load(x + row.to(tl.int64) * pitch + column, mask=column < D, other=0).to(tl.float32) * weight
    tl.store(out + row.to(tl.int64) * D + column, values.to(out.dtype.element_ty), mask=column < D)


def weigh(x: Tensor, weights: Tensor, *, config: Config | None = None) -> Tensor:
    """x [n, d], its rows contiguous, times weights fp32 [n], perhaps one value expanded -> [n, d] in x's dtype, rounded
    once."""
    n, d = x.shape
    out = x.new_empty(n, d)
    config = config or pick(CONFIGS["weigh"], x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            linear_cross_entropy_weigh[(n * triton.cdiv(d, config.tiles["TILE"]),)](
                x, weights, out, weights.stride(0), x.stride(0), D=d, **config.arguments())
    return out
