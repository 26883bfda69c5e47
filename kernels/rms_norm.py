"""rms_norm: Triton kernels of x / rms(x) · weight with the residual add, and of its backward; one that gives the thin
product with the adapters too, one for a weight that is trained.

Bound by memory. A row lies in registers between its one read and its one write, so a result may lie where an operand
lay (not where the thin product is made as well). Arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

# TILE: values of a program, 16 a thread; narrower rows come several at a time, wider ones get more warps (`row_tiles`).
CONFIGS = {
    "forward": {80: Config({"TILE": 2048}, num_warps=4, registers=48, shared=256)},
    "backward": {80: Config({"TILE": 2048}, num_warps=4, registers=64, shared=256)},
    "backward_weight": {80: Config({"TILE": 2048}, num_warps=4, registers=56, shared=8 << 10)},
    "forward_s": {80: Config({"BT": 64, "BK": 64}, num_warps=4, num_stages=2, registers=168, shared=41 << 10)},
    "forward_s_fp32": {80: Config({"BT": 16, "BK": 32}, num_warps=4, registers=168, shared=20 << 10)},
}


PROGRAMS = 512
"""At most so many sum up the weight's gradient, each over rows of its own: as many on every device, for its bits."""


def row_tiles(config: Config, d: int) -> tuple[dict[str, int], dict[str, Any]]:
    """(ROWS and BLOCK of a program, the options of its launch) for rows of d values: the values of a warp stay."""
    block, tile = triton.next_power_of_2(d), config.tiles["TILE"]
    warps = min(32, max(config.num_warps, block * config.num_warps // tile))
    return {"ROWS": max(1, tile // block), "BLOCK": block}, {**config.options(), "num_warps": warps}


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """[T, d] or [T, heads, d] -> (rows, heads, d)."""
    heads = x.shape[1] if x.dim() == 3 else 1
    return x.shape[0] * heads, heads, x.shape[-1]


# ---- forward --------------------------------------------------------------------------------------------------------
@triton.jit
def _starts(row, pitch, HEADS: tl.constexpr, D: tl.constexpr):
    """Where rows start in [T, HEADS, D]: heads lie side by side, tokens `pitch` apart."""
    token = row // HEADS
    return (token.to(tl.int64) * pitch + (row - token * HEADS) * D)[:, None]


@triton.jit
def _read(at, live):
    return tl.load(at, mask=live, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(x, residual, weight, total, y, rstd, rows, x_pitch, residual_pitch, y_pitch, eps,
                     APPLY: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr):
    """ROWS rows; APPLY: their rstd is read, not computed."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < D)[None, :]
    wide = _read(x + _starts(row, x_pitch, HEADS, D) + column[None, :], live)
    w = _read(weight + column, column < D)
    if residual is not None:
        wide += _read(residual + _starts(row, residual_pitch, HEADS, D) + column[None, :], live)
        narrow = wide.to(total.dtype.element_ty)
        tl.store(total + _starts(row, HEADS * D, HEADS, D) + column[None, :], narrow, mask=live)
        wide = narrow.to(tl.float32)      # what the backward will see
    if APPLY:
        scale = tl.load(rstd + row, mask=row < rows, other=0)
    else:
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
        tl.store(rstd + row, scale, mask=row < rows)
    tl.store(y + _starts(row, y_pitch, HEADS, D) + column[None, :],
             (wide * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=live)


def forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, out: Tensor | None = None,
            config: Config | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [T, d] or [T, heads, d], weight [d] -> (y like x, rstd fp32 [..., 1], total like x or None).

    total = x + residual, rounded to x's dtype; y = total·rstd·weight, rstd = 1 / sqrt(mean(total²) + eps) (Zhang &
    Sennrich 2019, arXiv:1910.07467). x, residual and out: fp32, fp16 or bf16; tokens may lie apart, heads and values
    side by side. `out` may be x or the residual itself.
    """
    total = None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return _forward(x, residual, weight, total, out, rstd, eps, False, config), rstd, total


def apply(x: Tensor, rstd: Tensor, weight: Tensor, *, out: Tensor | None = None,
          config: Config | None = None) -> Tensor:
    """y from x (the total, where there was a residual) and its stored rstd, with the bits of `forward`."""
    return _forward(x, None, weight, None, out, rstd, 0.0, True, config)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor | None,
             rstd: Tensor, eps: float, stored: bool, config: Config | None) -> Tensor:
    rows, heads, d = _sizes(x)
    y = x.new_empty(x.shape) if out is None else out
    tiles, options = row_tiles(config or pick(CONFIGS["forward"], x.device), d)
    with torch.cuda.device_of(x):
        rms_norm_forward[(triton.cdiv(rows, tiles["ROWS"]),)](
            x, residual, weight, total, y, rstd, rows, x.stride(0), None if residual is None else residual.stride(0),
            y.stride(0), eps, APPLY=stored, HEADS=heads, D=d, **tiles, **options)
    return y


# ---- forward, with the thin product ---------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_s(x, residual, weight, a, total, y, rstd, s, rows, x_pitch, residual_pitch, y_pitch, eps,
                       D: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """BT rows, BK columns at a time: the squares first, then what they scale, which meets its columns of a [R, D] as it
    is made. What is read a second time is in the L2 cache only where few rows are at work; else this saves a launch and
    no traffic."""
    EVEN: tl.constexpr = D % BK == 0
    row, lane, rank = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, RANK)
    inside = (row < rows)[:, None]
    x_row, y_row = (row.to(tl.int64) * x_pitch)[:, None], (row.to(tl.int64) * y_pitch)[:, None]
    total_row = (row.to(tl.int64) * D)[:, None]
    squares = tl.zeros([BT], tl.float32)
    for start in range(0, D, BK):
        column = start + lane
        live = inside if EVEN else inside & (column < D)[None, :]
        wide = _read(x + x_row + column[None, :], live)
        if residual is not None:
            wide += _read(residual + (row.to(tl.int64) * residual_pitch)[:, None] + column[None, :], live)
            narrow = wide.to(total.dtype.element_ty)
            tl.store(total + total_row + column[None, :], narrow, mask=live)
            wide = narrow.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    scale = tl.rsqrt(squares / D + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    if residual is not None:
        tl.debug_barrier()      # a value of the total may be read by another thread than wrote it
        x, x_row = total, total_row
    acc = tl.zeros([BT, RANK], tl.float32)
    for start in range(0, D, BK):
        column = start + lane
        live = inside if EVEN else inside & (column < D)[None, :]
        wide = _read(x + x_row + column[None, :], live)
        w = _read(weight + column, column < D)
        narrow = (wide * scale[:, None] * w[None, :]).to(y.dtype.element_ty)
        tl.store(y + y_row + column[None, :], narrow, mask=live)
        known = (rank < R)[None, :] & (column < D)[:, None]
        acc = tl.dot(narrow, tl.load(a + rank[None, :] * D + column[:, None], mask=known, other=0), acc,
                     input_precision="ieee")
    tl.store(s + (row.to(tl.int64) * R)[:, None] + rank[None, :], acc.to(s.dtype.element_ty),
             mask=inside & (rank < R)[None, :])


def forward_s(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, a: Tensor, *, out: Tensor | None = None,
              config: Config | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`forward` of x [T, d], and with a [R, d] of one dtype S = y·aᵀ [T, R], R <= 128 -> (y, rstd, total, S).

    y has not the bits of `forward`, for the squares are added in another order. The rows of `a` lie side by side; `out`
    must be neither x nor the residual.
    """
    (rows, d), rank = x.shape, len(a)
    total = None if residual is None else x.new_empty(x.shape)
    rstd, s = x.new_empty(rows, 1, dtype=torch.float32), x.new_empty(rows, rank)
    y = x.new_empty(x.shape) if out is None else out
    if not rows:
        return y, rstd, total, s
    config = config or pick(CONFIGS["forward_s_fp32" if x.dtype == torch.float32 else "forward_s"], x.device)
    with torch.cuda.device_of(x):
        rms_norm_forward_s[(triton.cdiv(rows, config.tiles["BT"]),)](
            x, residual, weight, a, total, y, rstd, s, rows, x.stride(0),
            None if residual is None else residual.stride(0), y.stride(0), eps, D=d, R=rank, RANK=rank_tile(rank),
            **config.arguments())
    return y, rstd, total, s


def rank_tile(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


# ---- backward -------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward(dy, x, rstd, weight, residual, dx, rows, dy_pitch, x_pitch, residual_pitch, dx_pitch,
                      HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < D)[None, :]
    gradient = _read(dy + _starts(row, dy_pitch, HEADS, D) + column[None, :], live)
    wide = _read(x + _starts(row, x_pitch, HEADS, D) + column[None, :], live)
    scale = tl.load(rstd + row, mask=row < rows, other=0)
    if residual is not None:      # with the other loads, not behind the sum's barrier
        past = _read(residual + _starts(row, residual_pitch, HEADS, D) + column[None, :], live)
    gradient *= _read(weight + column, column < D)[None, :]
    projection = tl.sum(gradient * wide, axis=1) * scale * scale / D
    slope = (gradient - wide * projection[:, None]) * scale[:, None]
    if residual is not None:
        slope += past
    tl.store(dx + _starts(row, dx_pitch, HEADS, D) + column[None, :], slope.to(dx.dtype.element_ty), mask=live)


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None = None, *,
             out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """dy, x [T, d] or [T, heads, d], rstd fp32 [..., 1], contiguous, weight [d] -> dx like x.

    With g = dy·weight: dx = rstd·(g - x·rstd²·mean(g·x)) + residual, the gradient that flows past the norm. Tokens of
    each tensor but rstd may lie apart; `out` may be dy, the residual or x itself.
    """
    rows, heads, d = _sizes(x)
    dx = x.new_empty(x.shape) if out is None else out
    tiles, options = row_tiles(config or pick(CONFIGS["backward"], x.device), d)
    with torch.cuda.device_of(x):
        rms_norm_backward[(triton.cdiv(rows, tiles["ROWS"]),)](
            dy, x, rstd, weight, residual, dx, rows, dy.stride(0), x.stride(0),
            None if residual is None else residual.stride(0), dx.stride(0), HEADS=heads, D=d, **tiles, **options)
    return dx


# ---- the weight's gradient ------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows", "tiles_each"])
def rms_norm_backward_weight(dy, x, rstd, partial, rows, tiles_each, dy_pitch, x_pitch, HEADS: tl.constexpr,
                             D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over `tiles_each` tiles of ROWS rows, into a row of `partial` fp32 [programs, D]."""
    program, lane, column = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles_each):
        row = (program * tiles_each + tile) * ROWS + lane
        live = (row < rows)[:, None] & (column < D)[None, :]
        gradient = _read(dy + _starts(row, dy_pitch, HEADS, D) + column[None, :], live)
        wide = _read(x + _starts(row, x_pitch, HEADS, D) + column[None, :], live)
        acc += gradient * wide * tl.load(rstd + row, mask=row < rows, other=0)[:, None]
    tl.store(partial + program.to(tl.int64) * D + column, tl.sum(acc, axis=0), mask=column < D)


def backward_weight(dy: Tensor, x: Tensor, rstd: Tensor, *, config: Config | None = None) -> Tensor:
    """dy, x [T, d] or [T, heads, d], rstd fp32 [..., 1], contiguous -> the weight's gradient fp32 [d]: the sum of
    dy·x·rstd over all rows, always in the same order. Tokens of dy and x may lie apart."""
    rows, heads, d = _sizes(x)
    tiles, options = row_tiles(config or pick(CONFIGS["backward_weight"], x.device), d)
    count = triton.cdiv(rows, tiles["ROWS"])
    each = max(1, triton.cdiv(count, PROGRAMS))
    partial = torch.empty(triton.cdiv(count, each), d, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_weight[(len(partial),)](dy, x, rstd, partial, rows, each, dy.stride(0), x.stride(0),
                                                  HEADS=heads, D=d, **tiles, **options)
    return partial.sum(0)
