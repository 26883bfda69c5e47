"""lora_matmul: Triton kernels for a frozen product with a low-rank one inside it, and for the adapters' gradients.

The long products take x [T, K] and its thin companion s [T, R] in one loop, K first and then R, into one fp32
accumulator that is rounded once. The adapters' gradients are bound by memory: they read their large operand once. Sums
that are split have their parts in fp32 scratch and are added in a fixed order, so every result is repeatable to the
bit. Tile names: BT tokens, BN columns of the output, BK of the inner loop, BR of the rank, BC of the large operand's
columns. The thin products S = x·Aᵀ and dS = dy·B are the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

ENOUGH, FULL, LEAST_STEPS = 100, 264, 4
"""A loop that fewer than ENOUGH programs run is split until FULL do (two for each of an H100's 132 processors), but
into parts of LEAST_STEPS at least. Sizes alone decide: the order of a sum must not depend on the device."""


def _product(bt: int, bn: int, bk: int, warps: int, stages: int, registers: int, shared: int) -> Config:
    return Config({"BT": bt, "BN": bn, "BK": bk, "GROUP": 8}, warps, stages, registers, shared << 10)


def _adapters(bc: int, br: int, bt: int, warps: int, stages: int, registers: int, shared: int) -> Config:
    return Config({"BC": bc, "BR": br, "BT": bt}, warps, stages, registers, shared << 10)


CONFIGS: dict[str, dict[int, Config]] = {
    "product": {80: _product(128, 256, 32, 8, 4, 240, 72), 89: _product(128, 128, 32, 4, 4, 240, 48),
                90: _product(128, 256, 64, 8, 4, 224, 192), 100: _product(128, 256, 64, 8, 4, 176, 193)},
    "product_small": {80: _product(64, 64, 32, 4, 2, 168, 17)},
    "adapters": {80: _adapters(128, 64, 64, 4, 3, 176, 73)},
    "adapters_wide": {80: _adapters(128, 128, 64, 8, 3, 176, 97)},
    "adapters_fp32": {80: _adapters(64, 64, 32, 4, 2, 128, 16)},
    "sum": {80: Config({"TILE": 1024}, 4, 1, 64)},
}
"""_fp32: products of fp32 run on the common units; _small: these too, and sizes whose rows are no whole 16-byte reads,
which are made right, not fast. BR is the most of the rank that a program holds; a smaller rank takes the next power of
two, one above 64 the `_wide` entry."""


# ---- the long product -----------------------------------------------------------------------------------------------
@triton.jit
def _tile_of(pid, t_tiles, n_tiles, GROUP: tl.constexpr):
    """Programs that run together share a block of GROUP tiles of x and some of the weight, which stay in the L2."""
    group = pid // (GROUP * n_tiles)
    within = pid % (GROUP * n_tiles)
    rows = min(t_tiles - group * GROUP, GROUP)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _load(at, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=mask, other=0)
    else:
        return tl.load(at)


@triton.jit(do_not_specialize=["T"])
def lora_product(x, weight, s, b, bias, out, T, K, N, x_pitch, weight_pitch, out_pitch, R: tl.constexpr,
                 TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BT: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """out [T, N] = x [T, K]·weight + s [T, R]·b + bias; weight [K, N] and b [R, N], or TRANSPOSED [N, K] and [N, R].

    A step of the loop takes BK of K from x and weight or, behind them, of R from s and b: only the addresses change,
    so s and b are fetched ahead of time as the rest is. That takes ranks whose rows are whole 16-byte reads; others
    have a loop of their own. Rows behind the last one repeat it and are not stored.
    """
    JOINED: tl.constexpr = R > 0 and R % 8 == 0
    MASKED: tl.constexpr = not EVEN_K or (JOINED and R % BK != 0)
    t_tile, n_tile = _tile_of(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(N, BN), GROUP)
    t, n, lane = tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BK)
    t_first, n_first = t_tile.to(tl.int64) * BT, n_tile.to(tl.int64) * BN
    row = tl.minimum(t, T - 1 - t_tile * BT)
    n_left = N - n_tile * BN
    column = tl.minimum(n, n_left - 1) if TRANSPOSED else n
    x += t_first * x_pitch
    weight += n_first * weight_pitch if TRANSPOSED else n_first
    if R > 0:
        s += t_first * R
        b += n_first * R if TRANSPOSED else n_first
    k_steps = tl.cdiv(K, BK)
    steps = k_steps + (R + BK - 1) // BK if JOINED else k_steps
    acc = tl.zeros([BT, BN], tl.float32)
    # tl.maximum: where a loop might be passed over, acc is set in a second place too, and ptxas then waits for each
    # matrix instruction of Hopper before it issues the next.
    for step in range(0, tl.maximum(steps, 1)):
        start, left, left_at, left_pitch, right_at, right_pitch = step * BK, K, x, x_pitch, weight, weight_pitch
        if JOINED:
            tail = step >= k_steps
            start = tl.where(tail, step - k_steps, step) * BK
            left = tl.where(tail, R, K)
            left_at, left_pitch = tl.where(tail, s, x), tl.where(tail, R, x_pitch)
            right_at, right_pitch = tl.where(tail, b, weight), tl.where(tail, R if TRANSPOSED else N, weight_pitch)
        live = lane < left - start
        x_tile = _load(left_at + start + (row[:, None] * left_pitch + lane[None, :]), live[None, :], MASKED)
        if TRANSPOSED:
            right = right_at + start + (column[None, :] * right_pitch + lane[:, None])
            w_tile = _load(right, live[:, None], MASKED)
        else:
            right = right_at + tl.cast(start, tl.int64) * right_pitch + (lane[:, None] * right_pitch + column[None, :])
            w_tile = _load(right, live[:, None] & (column < n_left)[None, :], MASKED or not EVEN_N)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    if R > 0 and not JOINED:
        for start in tl.range(0, R, 16, num_stages=1):
            rank = start + tl.arange(0, 16)
            s_tile = tl.load(s + row[:, None] * R + rank[None, :], mask=(rank < R)[None, :], other=0)
            right = column[None, :] * R + rank[:, None] if TRANSPOSED else rank[:, None] * N + column[None, :]
            b_tile = tl.load(b + right, mask=(rank < R)[:, None] & (column < n_left)[None, :], other=0)
            acc = tl.dot(s_tile, b_tile, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n_first + n, mask=n < n_left, other=0).to(tl.float32)[None, :]
    at = out + t_first * out_pitch + n_first + (t[:, None] * out_pitch + n[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < T - t_tile * BT)[:, None] & (n < n_left)[None, :])


def forward(x: Tensor, weight: Tensor, s: Tensor | None, b: Tensor | None, bias: Tensor | None, *,
            out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x [T, K], weight [N, K], s [T, R] with b [N, R] or both None, bias [N] or None -> y [T, N] = x·Wᵀ + s·bᵀ + bias.

    One dtype, fp32, fp16 or bf16 (bias: any). Rows are contiguous; those of x, weight and out may lie apart.
    """
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    return _launch_product(x, weight, s, b, bias, out, True, config)


def backward_input(dy: Tensor, weight: Tensor, ds: Tensor | None, a: Tensor | None, *, out: Tensor | None = None,
                   config: Config | None = None) -> Tensor:
    """dy [T, N], weight [N, K], ds [T, R] with a [R, K] or both None -> dx [T, K] = dy·W + ds·a. As `forward`."""
    out = dy.new_empty(dy.shape[0], weight.shape[1]) if out is None else out
    return _launch_product(dy, weight, ds, a, None, out, False, config)


def _launch_product(x: Tensor, weight: Tensor, s: Tensor | None, b: Tensor | None, bias: Tensor | None, out: Tensor,
                    transposed: bool, config: Config | None) -> Tensor:
    (tokens, depth), width = x.shape, out.shape[1]
    if not out.numel():
        return out
    sizes = (depth, width, x.stride(0), weight.stride(0), out.stride(0))
    small = x.dtype == torch.float32 or any(size % 16 for size in sizes)
    config = config or pick(CONFIGS["product_small" if small else "product"], x.device)
    tiles = config.tiles
    grid = (triton.cdiv(tokens, tiles["BT"]) * triton.cdiv(width, tiles["BN"]),)
    with torch.cuda.device_of(x):
        lora_product[grid](x, weight, s, b, bias, out, tokens, depth, width, x.stride(0), weight.stride(0),
                           out.stride(0), R=0 if s is None else s.shape[1], TRANSPOSED=transposed,
                           EVEN_K=depth % tiles["BK"] == 0, EVEN_N=width % tiles["BN"] == 0, **config.arguments())
    return out


@triton.jit(do_not_specialize=["parts"])
def lora_sum(scratch, out, parts, n, TILE: tl.constexpr):
    """out [n] = the sum of scratch [parts, n] from the first part to the last."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float32)
    for part in range(0, parts):
        acc += tl.load(scratch + tl.cast(part, tl.int64) * n + i, mask=i < n, other=0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < n)


# ---- gradients of the adapters --------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T", "part_steps"])
def lora_adapters(wide, narrow, out, T, C, pitch, part_steps, R: tl.constexpr, TRANSPOSED: tl.constexpr,
                  BC: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """out [parts, C, R] = wideᵀ·narrow of wide [T, C] and narrow [T, R], over part_steps · BT tokens each; TRANSPOSED:
    out [parts, R, C]."""
    r_first, c_first, part = tl.program_id(0) * BR, tl.program_id(1) * BC, tl.program_id(2)
    r, c, lane = r_first + tl.arange(0, BR), c_first + tl.arange(0, BC), tl.arange(0, BT)
    first = part * part_steps
    steps = tl.minimum(part_steps, tl.cdiv(T, BT) - first)
    acc = tl.zeros([BC, BR], tl.float32)
    for step in range(0, tl.maximum(steps, 1)):
        start = (first + step) * BT
        live = lane < T - start
        place = tl.cast(start, tl.int64)
        wide_tile = tl.load(wide + place * pitch + (lane[None, :] * pitch + c[:, None]),
                            mask=live[None, :] & (c < C)[:, None], other=0)
        narrow_tile = tl.load(narrow + place * R + (lane[:, None] * R + r[None, :]),
                              mask=live[:, None] & (r < R)[None, :], other=0)
        acc = tl.dot(wide_tile, narrow_tile, acc, input_precision="ieee")
    at = r[None, :] * C + c[:, None] if TRANSPOSED else c[:, None] * R + r[None, :]
    tl.store(out + part.to(tl.int64) * C * R + at, acc, mask=(c < C)[:, None] & (r < R)[None, :])


def backward_adapters(dy: Tensor, x: Tensor, s: Tensor, ds: Tensor, *, config: Config | None = None,
                      ) -> tuple[Tensor, Tensor]:
    """dy [T, N], x [T, K], s and ds [T, R] -> (dA = dsᵀ·x [R, K], dB = dyᵀ·s [N, R]), both fp32.

    x and dy are read once, their rows may lie apart. dB has no scale in it and has the cross terms of fused parts.
    """
    return _gradient(x, ds, True, config), _gradient(dy, s, False, config)


def _gradient(wide: Tensor, narrow: Tensor, transposed: bool, config: Config | None) -> Tensor:
    """wide [T, C], narrow [T, R] -> wideᵀ·narrow [C, R] or, transposed, narrowᵀ·wide [R, C]; fp32."""
    (tokens, columns), rank = wide.shape, narrow.shape[1]
    shape = (rank, columns) if transposed else (columns, rank)
    if not tokens:
        return wide.new_zeros(shape, dtype=torch.float32)
    config = config or _ranked("adapters", wide, rank)
    tiles = {**config.tiles, "BR": _rank_tile(rank, config)}
    grid = (triton.cdiv(rank, tiles["BR"]), triton.cdiv(columns, tiles["BC"]))
    steps = triton.cdiv(tokens, tiles["BT"])
    part_steps = _part_steps(grid[0] * grid[1], steps)
    parts = triton.cdiv(steps, part_steps)
    target = wide.new_empty(parts, *shape, dtype=torch.float32)
    with torch.cuda.device_of(wide):
        lora_adapters[(*grid, parts)](wide, narrow, target, tokens, columns, wide.stride(0), part_steps, R=rank,
                                      TRANSPOSED=transposed, **tiles, **config.options())
    return target[0] if parts == 1 else _add_parts(target, wide.new_empty(shape, dtype=torch.float32))


# ---- what both share ------------------------------------------------------------------------------------------------
def _ranked(kernel: str, x: Tensor, rank: int) -> Config:
    kind = "_fp32" if x.dtype == torch.float32 else "_wide" if rank > 64 else ""
    return pick(CONFIGS[kernel + kind], x.device)


def _rank_tile(rank: int, config: Config) -> int:
    return min(config.tiles["BR"], max(16, triton.next_power_of_2(rank)))


def _part_steps(programs: int, steps: int) -> int:
    """Steps of each part when a loop of `steps`, run by `programs`, is split until the GPU is filled."""
    parts = 1 if programs >= ENOUGH else max(1, min(FULL // programs, steps // LEAST_STEPS))
    return triton.cdiv(steps, parts)


def _add_parts(scratch: Tensor, out: Tensor) -> Tensor:
    """scratch [parts, …] fp32 -> their sum in out."""
    config = pick(CONFIGS["sum"], out.device)
    with torch.cuda.device_of(out):
        lora_sum[(triton.cdiv(out.numel(), config.tiles["TILE"]),)](scratch, out, scratch.shape[0], out.numel(),
                                                                    **config.arguments())
    return out
