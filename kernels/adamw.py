"""adamw: Triton kernels for one AdamW step over a flat fp32 buffer, with moments in fp32 or in 8 bits by blocks.

Both are bound by memory. Nothing is fused into a multiply-add and quotients are rounded as IEEE says: a code turns on
the last bit of a moment, and the 8-bit kernel gives the codes of the reference in minitune/ops/adamw.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

BLOCK = tl.constexpr(256)
"""Values that share one absmax; also the levels of a table, and the places of the tree behind them."""
TINY_BITS = tl.constexpr(0x006CE3EE)      # the bits of 1e-38 in fp32, which Triton would take for an fp64 constant

CONFIGS: dict[str, dict[int, Config]] = {
    "adamw": {80: Config({"TILE": 1024}, num_warps=4, registers=64)},
    "adamw_8bit": {80: Config({}, num_warps=1, registers=80)},      # a block, 8 values a lane: no shared memory
}
SCALARS = ["decay", "beta1", "rest1", "beta2", "rest2", "step_size", "root_scale", "eps"]
"""What may change from step to step: floats, so nothing is compiled anew and the device is not asked."""


@triton.jit
def _scaled(g, place, grad_scale, live):
    """The gradient, scaled in its place, and whether the step is taken: not if the scale is NaN. Called when all else
    is loaded: a store lets no later load go before it."""
    sound = tl.full([], True, tl.int1)
    if grad_scale is not None:
        scale = tl.load(grad_scale)
        g *= scale
        tl.store(place, g, mask=live)
        sound = scale == scale
    return g, sound


@triton.jit
def _moved(p, m, v, decay, step_size, root_scale, eps):
    return p * decay - tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps) * step_size


def _scalars(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """SCALARS, in fp64 until the launch. `root_scale`: 1 / the root of the second moment's bias correction."""
    return (1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), eps)


# ---- moments in fp32 ------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=SCALARS)
def adamw(param, grad, exp_avg, exp_avg_sq, grad_scale, n, decay, beta1, rest1, beta2, rest2, step_size, root_scale,
          eps, TILE: tl.constexpr):
    """TILE elements. `n` is specialised: masked loads are wide only where it is known to be a multiple of 16."""
    start = tl.program_id(0).to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    live = local < n - start
    param, grad, exp_avg, exp_avg_sq = param + start, grad + start, exp_avg + start, exp_avg_sq + start
    g = tl.load(grad + local, mask=live, other=0)
    m = tl.load(exp_avg + local, mask=live, other=0)
    v = tl.load(exp_avg_sq + local, mask=live, other=0)
    p = tl.load(param + local, mask=live, other=0)
    g, sound = _scaled(g, grad + local, grad_scale, live)
    kept = tl.where(sound, live, False)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * rest2 * g
    tl.store(param + local, _moved(p, m, v, decay, step_size, root_scale, eps), mask=kept)
    tl.store(exp_avg + local, m, mask=kept)
    tl.store(exp_avg_sq + local, v, mask=kept)


def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float,
           eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None,
           config: Config | None = None) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), in place.

    All [n], fp32, contiguous; `grad_scale` fp32 [], multiplied into `grad` in place; where it is NaN nothing else is
    written. `step` counts from 1.
    """
    n = param.numel()
    if n == 0:
        return
    config = config or pick(CONFIGS["adamw"], param.device)
    with torch.cuda.device_of(param):
        adamw[(triton.cdiv(n, config.tiles["TILE"]),)](
            param, grad, exp_avg, exp_avg_sq, grad_scale, n, *_scalars(lr, beta1, beta2, eps, weight_decay, step),
            **config.arguments(), enable_fp_fusion=False)


# ---- moments in 8 bits ----------------------------------------------------------------------------------------------
@triton.jit
def _decode(codes, absmax, table, live):
    """level · absmax; 0 behind the end."""
    level = tl.load(table + tl.load(codes, mask=live, other=0).to(tl.int32))
    return tl.where(live, level * tl.load(absmax), 0.0)


@triton.jit
def _encode(x, codes, absmax, table, kept, sound, LEAST: tl.constexpr):
    """Store absmax and, for each value, the number of midpoints below x / absmax; above 0 a code is at least LEAST.
    Nothing, if not `sound`.

    Behind the levels lie the midpoints, as a tree: the children of node k are 2 k and 2 k + 1, so after 8 steps from
    node 1 each lane is at 256 + its code, and no step reads beyond node 255, whatever x is.
    """
    # Magnitudes are ordered as their bits are, and NaN is above them all: tl.max of floats would drop a NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    tl.store(absmax, largest.to(tl.float32, bitcast=True), mask=sound)
    scaled = x * tl.div_rn(1.0, tl.maximum(largest, TINY_BITS).to(tl.float32, bitcast=True))
    node = tl.full(x.shape, 1, tl.int32)
    for _ in tl.static_range(8):
        node = node * 2 + tl.where(scaled <= tl.load(table + BLOCK + node), 0, 1)
    code = node - BLOCK
    if LEAST > 0:
        code = tl.where(x > 0, tl.maximum(code, LEAST), code)
    tl.store(codes, code.to(tl.uint8), mask=kept)


@triton.jit(do_not_specialize=SCALARS)
def adamw_8bit(param, grad, mean_codes, mean_absmax, square_codes, square_absmax, signed, unsigned, grad_scale, n,
               decay, beta1, rest1, beta2, rest2, step_size, root_scale, eps):
    """One block, so absmax is a scalar; one warp, so no shared memory is needed. `n` is specialised as above."""
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    local = tl.arange(0, BLOCK)
    live = local < n - start
    param, grad, mean_codes, square_codes = param + start, grad + start, mean_codes + start, square_codes + start
    mean_absmax, square_absmax = mean_absmax + block, square_absmax + block
    g = tl.load(grad + local, mask=live, other=0)
    p = tl.load(param + local, mask=live, other=0)
    m = _decode(mean_codes + local, mean_absmax, signed, live)
    v = _decode(square_codes + local, square_absmax, unsigned, live)
    g, sound = _scaled(g, grad + local, grad_scale, live)
    kept = tl.where(sound, live, False)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * rest2 * g
    tl.store(param + local, _moved(p, m, v, decay, step_size, root_scale, eps), mask=kept)
    _encode(m, mean_codes + local, mean_absmax, signed, kept, sound, LEAST=0)
    _encode(v, square_codes + local, square_absmax, unsigned, kept, sound, LEAST=1)


def adamw_8bit_(param: Tensor, grad: Tensor, mean_codes: Tensor, mean_absmax: Tensor, square_codes: Tensor,
                square_absmax: Tensor, signed: Tensor, unsigned: Tensor, *, lr: float, beta1: float, beta2: float,
                eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None,
                config: Config | None = None) -> None:
    """`adamw_` with moments in 8 bits by blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861), in place.

    param, grad fp32 [n]; codes uint8 [n]; absmax fp32 [ceil(n / 256)]; the tables `signed` and `unsigned` fp32
    [2, 256]: levels, tree of midpoints (minitune/ops/moments8.py). All contiguous.
    """
    n = param.numel()
    if n == 0:
        return
    config = config or pick(CONFIGS["adamw_8bit"], param.device)
    with torch.cuda.device_of(param):
        adamw_8bit[(triton.cdiv(n, BLOCK.value),)](
            param, grad, mean_codes, mean_absmax, square_codes, square_absmax, signed, unsigned, grad_scale, n,
            *_scalars(lr, beta1, beta2, eps, weight_decay, step), **config.arguments(), enable_fp_fusion=False)
