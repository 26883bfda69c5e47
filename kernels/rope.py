"""rope: Triton kernels that rotate the heads of a view in place, forth or back, or on their way into another one.

A program takes some tokens with all their heads: their cos and sin are read once, then CHUNK heads at a time are read,
turned in fp32 and written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

# TILE: pairs that are turned at a time, 8 a thread: two 16-byte loads in 16 bits.
# CHUNK: 8 divides the 40, 32, 36 and 72 heads of q and k of common models, so no lane is idle.
CONFIGS = {
    "rotate": {80: Config({"TILE": 1024, "CHUNK": 8}, num_warps=4, registers=40, shared=512)},
    "join": {80: Config({"TILE": 1024, "CHUNK": 8}, num_warps=4, registers=48, shared=512)},      # three more pointers
}


@triton.jit
def _angles(cos, sin, token, pair, tokens, BACK: tl.constexpr, HALF: tl.constexpr):
    """(cos, sin [TOKENS, 1, BLOCK], which of them there are)."""
    known = (token < tokens)[:, None] & (pair < HALF)[None, :]
    angle = token.to(tl.int64)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=known, other=0)[:, None, :]
    s = tl.load(sin + angle, mask=known, other=0)[:, None, :]
    return c, -s if BACK else s, known


@triton.jit
def _turn(x, out, c, s, known, TURN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr):
    """x and out [TOKENS, 1, BLOCK]: where each token's first head has its pairs; without TURN they are only moved."""
    for first in range(0, HEADS, CHUNK):
        head = first + tl.arange(0, CHUNK)
        live = known[:, None, :] & (head < HEADS)[None, :, None]
        at = (head * (2 * HALF))[None, :, None]
        a = tl.load(x + at, mask=live, other=0)
        b = tl.load(x + at + HALF, mask=live, other=0)
        if TURN:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * c - wide_b * s).to(out.dtype.element_ty)
            b = (wide_b * c + wide_a * s).to(out.dtype.element_ty)
        tl.store(out + at, a, mask=live)
        tl.store(out + at + HALF, b, mask=live)


@triton.jit(do_not_specialize=["tokens"])
def rope_rotate(x, cos, sin, tokens, pitch, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
                TOKENS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """TOKENS tokens; BLOCK: HALF, the pairs of a head, rounded up to a power of two."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    c, s, known = _angles(cos, sin, token, pair, tokens, BACK, HALF)
    start = x + token.to(tl.int64)[:, None, None] * pitch + pair[None, None, :]
    _turn(start, start, c, s, known, True, HEADS, HALF, CHUNK)


@triton.jit(do_not_specialize=["tokens"])
def rope_join(q, k, v, out, cos, sin, tokens, q_pitch, k_pitch, v_pitch, pitch, BACK: tl.constexpr,
              HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
              CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """As rope_rotate, q and k turned, v as it is."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, BLOCK)
    c, s, known = _angles(cos, sin, token, pair, tokens, BACK, HALF)
    row, lane = token.to(tl.int64)[:, None, None], pair[None, None, :]
    to = out + row * pitch + lane
    _turn(q + row * q_pitch + lane, to, c, s, known, True, HEADS, HALF, CHUNK)
    _turn(k + row * k_pitch + lane, to + HEADS * 2 * HALF, c, s, known, True, KV_HEADS, HALF, CHUNK)
    _turn(v + row * v_pitch + lane, to + (HEADS + KV_HEADS) * 2 * HALF, c, s, known, False, KV_HEADS, HALF, CHUNK)


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


def join(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False,
         config: Config | None = None) -> Tensor:
    """q [T, heads, D], k and v [T, kv_heads, D] -> side by side in out [T, heads + 2·kv_heads, D], q and k rotated with
    the bits of `rotate_`. All as x there; of one dtype."""
    tokens, heads, half = q.shape[0], q.shape[1], q.shape[2] // 2
    config = config or pick(CONFIGS["join"], q.device)
    with torch.cuda.device_of(q):
        tiles = rotate_tiles(config, heads, half)
        rope_join[(triton.cdiv(tokens, tiles["TOKENS"]),)](
            q, k, v, out, cos, sin, tokens, q.stride(0), k.stride(0), v.stride(0), out.stride(0), BACK=back,
            HEADS=heads, KV_HEADS=k.shape[1], HALF=half, **tiles, **config.options())
    return out


def rotate_tiles(config: Config, heads: int, half: int) -> dict[str, int]:
    """As many tokens as fill a tile: small heads come in greater number."""
    block, chunk = triton.next_power_of_2(half), min(triton.next_power_of_2(heads), config.tiles["CHUNK"])
    return {"TOKENS": max(1, config.tiles["TILE"] // (chunk * block)), "CHUNK": chunk, "BLOCK": block}
