"""rope: the Triton kernel that rotates the heads of a view in place, forth or back.

A program takes some tokens with all their heads: their cos and sin are read once, then CHUNK heads at a time are read,
turned in fp32 and written back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

# TILE: pairs that are turned at a time, 8 a thread: two 16-byte loads in 16 bits.
# CHUNK: 8 divides the 40, 32, 36 and 72 heads of q and k of common models, so no lane is idle.
CONFIGS = {"rotate": {80: Config({"TILE": 1024, "CHUNK": 8}, num_warps=4, registers=40, shared=512)}}


@triton.jit(do_not_specialize=["tokens"])
def rope_rotate(x, cos, sin, tokens, pitch, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
                TOKENS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """TOKENS tokens; BLOCK: HALF, the pairs of a head, rounded up to a power of two."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    known = (token < tokens)[:, None] & (pair < HALF)[None, :]
    angle = token.to(tl.int64)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=known, other=0)[:, None, :]
    s = tl.load(sin + angle, mask=known, other=0)[:, None, :]
    if BACK:
        s = -s
    start = x + token.to(tl.int64)[:, None, None] * pitch + pair[None, None, :]
    for first in range(0, HEADS, CHUNK):
        head = first + tl.arange(0, CHUNK)
        live = known[:, None, :] & (head < HEADS)[None, :, None]
        at = start + (head * (2 * HALF))[None, :, None]
        a = tl.load(at, mask=live, other=0).to(tl.float32)
        b = tl.load(at + HALF, mask=live, other=0).to(tl.float32)
        tl.store(at, (a * c - b * s).to(x.dtype.element_ty), mask=live)
        tl.store(at + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=live)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False, config: Config | None = None) -> Tensor:
    """x [T, heads, D], a view with strides (row, D, 1), fp32, fp16 or bf16; cos, sin fp32 [T, D / 2], contiguous.

    In place: the halves (a, b) of a head become (a·cos - b·sin, b·cos + a·sin) (Su et al. 2021, arXiv:2104.09864);
    ``back=True`` turns the other way. q and k that lie side by side in one buffer are best turned as one view.
    """
    tokens, heads, half = x.shape[0], x.shape[1], x.shape[2] // 2
    config = config or pick(CONFIGS["rotate"], x.device)
    with torch.cuda.device_of(x):
        tiles = rotate_tiles(config, heads, half)
        rope_rotate[(triton.cdiv(tokens, tiles["TOKENS"]),)](
            x, cos, sin, tokens, x.stride(0), BACK=back, HEADS=heads, HALF=half, **tiles, **config.options())
    return x


def rotate_tiles(config: Config, heads: int, half: int) -> dict[str, int]:
    """As many tokens as fill a tile: small heads come in greater number."""
    block, chunk = triton.next_power_of_2(half), min(triton.next_power_of_2(heads), config.tiles["CHUNK"])
    return {"TOKENS": max(1, config.tiles["TILE"] // (chunk * block)), "CHUNK": chunk, "BLOCK": block}
