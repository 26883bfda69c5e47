"""sgd: a Triton kernel for one SGD step with momentum over a flat fp32 buffer, as minitune/ops/sgd.py says it.

Bound by memory; nothing is fused into a multiply-add, so each operation is rounded as the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

CONFIGS: dict[str, dict[int, Config]] = {"sgd": {80: Config({"TILE": 1024}, num_warps=4, registers=48)}}


@triton.jit(do_not_specialize=["decay", "lr", "momentum"])
def sgd(param, grad, momentum_buffer, grad_scale, n, decay, lr, momentum, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
        TILE: tl.constexpr):
    """TILE elements. `n` is specialised: masked loads are wide only where it is known to be a multiple of 16."""
    start = tl.program_id(0).to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    live = local < n - start
    param, grad = param + start + local, grad + start + local
    g = tl.load(grad, mask=live, other=0)
    p = tl.load(param, mask=live, other=0)
    m = tl.zeros([TILE], tl.float32)
    if momentum_buffer is not None:
        momentum_buffer += start + local
        if not FIRST:
            m = tl.load(momentum_buffer, mask=live, other=0)
    if grad_scale is not None:      # after the loads: a store lets no later one go before it
        scale = tl.load(grad_scale)
        g *= scale
        tl.store(grad, g, mask=live)
        live = tl.where(scale == scale, live, False)
    move = g
    if momentum_buffer is not None:
        move = g if FIRST else m * momentum + g
        tl.store(momentum_buffer, move, mask=live)
        if NESTEROV:
            move = g + move * momentum
    tl.store(param, p * decay - move * lr, mask=live)


def sgd_(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *, lr: float, momentum: float, nesterov: bool,
         weight_decay: float, first: bool, grad_scale: Tensor | None = None, config: Config | None = None) -> None:
    """One step of SGD with decoupled weight decay (arXiv:1711.05101, algorithm 1), in place.

    All [n], fp32, contiguous; `grad_scale` fp32 [], multiplied into `grad` in place; where it is NaN nothing else is
    written. With momentum 0 the buffer is neither read nor written; where `first` it is only written.
    """
    n = param.numel()
    if n == 0:
        return
    config = config or pick(CONFIGS["sgd"], param.device)
    with torch.cuda.device_of(param):
        sgd[(triton.cdiv(n, config.tiles["TILE"]),)](
            param, grad, momentum_buffer if momentum else None, grad_scale, n, 1 - lr * weight_decay, lr, momentum,
            FIRST=first, NESTEROV=nesterov, **config.arguments(), enable_fp_fusion=False)
