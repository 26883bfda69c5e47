"""nf4: Triton kernels that decode and encode NF4 weights, with the bits of the reference in minitune/ops/nf4.py.

Both are bound by memory. Nothing may be fused into a multiply-add, and every quotient is rounded as IEEE says: else
the bits differ. A CONFIGS entry is what its kernel is launched with and what it may cost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 64
"""So many values, or a block of fewer, share one absmax and lie in one row of the output."""
WORD = tl.constexpr(8)
"""Values that are read at once, as 32 bits: a quarter fewer instructions than by bytes."""
NESTED_BLOCKSIZE = tl.constexpr(256)
TINY_BITS = tl.constexpr(0x006CE3EE)      # the bits of 1e-38 in fp32, which Triton would take for an fp64 constant


class Config(NamedTuple):
    """`tile`: what one program works on; `registers` of a thread and bytes of `shared` memory: what it may take
    (tests/kernels/test_aot.py holds both)."""

    tile: int
    num_warps: int
    registers: int
    shared: int = 4096

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


CONFIGS = {
    "dequantize": Config(tile=64, num_warps=4, registers=56),           # segments
    "dequantize_any": Config(tile=1024, num_warps=4, registers=64),     # values of a row
    "quantize": Config(tile=4096, num_warps=8, registers=48),           # values
}


# ---- dequantise -----------------------------------------------------------------------------------------------------
@triton.jit
def _absmax_of(absmax, nested_absmax, nested_code, nested_offset, block, live):
    scale = tl.load(absmax + block, mask=live, other=0)
    if nested_absmax is not None:
        code = tl.load(nested_code + scale.to(tl.int32))
        scale = code * tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=live, other=0) + tl.load(nested_offset)
    return scale


@triton.jit
def _levels_of(table, codes, SIZE: tl.constexpr):
    """A gather in one dimension looks levels up in shared memory: 16 levels, 16 banks, so no lane waits for another."""
    flat = tl.reshape(codes.to(tl.int32), [SIZE])
    return tl.reshape(tl.gather(tl.load(table + tl.arange(0, 16)), flat, 0), codes.shape)


@triton.jit(do_not_specialize=["segments", "row_segments"])
def nf4_dequantize(packed, absmax, nested_absmax, nested_code, nested_offset, table, out, segments, row_segments, pitch,
                   VALUES: tl.constexpr, PER_BLOCK: tl.constexpr, PITCHED: tl.constexpr, TILE: tl.constexpr):
    """TILE segments of VALUES values. Offsets within a tile are 32 bits wide, only its start is 64."""
    WORDS: tl.constexpr = VALUES // WORD
    first = tl.program_id(0) * TILE
    local = tl.arange(0, TILE)
    segment = first + local
    live = segment < segments
    scale = _absmax_of(absmax, nested_absmax, nested_code, nested_offset, segment // PER_BLOCK, live)
    word = local[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(packed.to(tl.pointer_type(tl.int32)) + first.to(tl.int64) * WORDS + word, mask=live[:, None],
                    other=0)
    shift = (tl.arange(0, WORD) ^ 1) * 4      # low byte first, in a byte the high half
    codes = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 15, [TILE, VALUES])
    values = _levels_of(table, codes, TILE * VALUES) * scale[:, None]
    lane = tl.arange(0, VALUES)[None, :]
    if PITCHED:
        row = segment // row_segments
        place = row.to(tl.int64) * pitch + (segment - row * row_segments) * VALUES
        at = out + place[:, None] + lane
    else:
        at = out + first.to(tl.int64) * VALUES + (local[:, None] * VALUES + lane)
    tl.store(at, values.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["start", "columns", "row_tiles", "pitch"])
def nf4_dequantize_any(packed, absmax, nested_absmax, nested_code, nested_offset, table, out, start, columns, row_tiles,
                       pitch, BLOCKSIZE: tl.constexpr, TILE: tl.constexpr):
    """TILE values of one row, its columns from `start` on: a value's flat index tells its block and its nibble."""
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    column = start + (tl.program_id(0) % row_tiles) * TILE + tl.arange(0, TILE)
    live = column < columns
    index = row * columns + column
    pair = tl.load(packed + (index >> 1), mask=live, other=0)
    codes = tl.where((index & 1) == 0, pair >> 4, pair & 15)
    scale = _absmax_of(absmax, nested_absmax, nested_code, nested_offset, index // BLOCKSIZE, live)
    values = _levels_of(table, codes, TILE) * scale
    tl.store(out + row * pitch + column, values.to(out.dtype.element_ty), mask=live)


def dequantize(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
               nested_offset: Tensor | None, table: Tensor, blocksize: int, target: Tensor) -> None:
    """Fill target [rows, columns], fp32, fp16 or bf16, whose rows are contiguous and may lie apart."""
    (rows, columns), pitch = target.shape, target.stride(0)
    values = min(blocksize, SEGMENT)
    if target.is_contiguous():      # one long row, whose end may be no whole segment
        rows, columns, pitch = 1, rows * columns, 0
    fits = (rows == 1 or columns % values == 0) and packed.data_ptr() % 4 == 0
    whole = columns // values if fits else 0
    rest = columns - whole * values
    weight = (packed, absmax, nested_absmax, nested_code, nested_offset, table, target)
    with torch.cuda.device_of(target):
        if rows * whole:
            config = CONFIGS["dequantize"]
            nf4_dequantize[(triton.cdiv(rows * whole, config.tile),)](
                *weight, rows * whole, whole, pitch, VALUES=values, PER_BLOCK=blocksize // values,
                PITCHED=rows > 1, TILE=config.tile, **config.options())
        if rest:
            config = CONFIGS["dequantize_any"]
            tiles = triton.cdiv(rest, config.tile)
            nf4_dequantize_any[(rows * tiles,)](*weight, whole * values, columns, tiles, pitch,
                                                BLOCKSIZE=blocksize, TILE=config.tile, **config.options())


# ---- quantise -------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["block", "n"])
def nf4_quantize(values, table, packed, absmax, block, n, BLOCKSIZE: tl.constexpr, LAST: tl.constexpr,
                 TILE: tl.constexpr):
    """TILE blocks from `block` on, of the first n values; LAST: the one that is not full, which is divided."""
    HALF: tl.constexpr = BLOCKSIZE // 2
    first = tl.program_id(0).to(tl.int64) * TILE + block
    rest = n - first * BLOCKSIZE
    row = tl.arange(0, TILE)
    live = row * BLOCKSIZE < rest
    lane = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    # A mask that is one for a whole row keeps loads and stores wide.
    x = tl.load(values + first * BLOCKSIZE + lane, mask=lane < rest if LAST else live[:, None], other=0).to(tl.float32)
    # Magnitudes are ordered as their bits are, and NaN is above them all: tl.max of floats would drop a NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    divisor = tl.maximum(largest, TINY_BITS).to(tl.float32, bitcast=True)
    if LAST:
        scaled = tl.div_rn(x, divisor[:, None])
        tl.store(absmax + first + row, divisor, mask=live)
    else:
        scaled = x * tl.div_rn(1.0, divisor)[:, None]
        tl.store(absmax + first + row, largest.to(tl.float32, bitcast=True), mask=live)
    codes = tl.zeros([TILE, BLOCKSIZE], tl.int32)
    for k in tl.static_range(15):
        midpoint = (tl.load(table + k) + tl.load(table + k + 1)) * 0.5
        codes = tl.where(scaled <= midpoint, codes, k + 1)      # the number of midpoints below
    high, low = tl.split(tl.reshape(codes, [TILE, HALF, 2]))      # behind the end lies 0: its code is the odd tail's
    tl.store(packed + first * HALF + byte, (high << 4 | low).to(tl.uint8),
             mask=byte * 2 < rest if LAST else live[:, None])


def quantize(flat: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """flat [n], fp32, fp16 or bf16 -> (packed uint8 [ceil(n / 2)], absmax fp32 [ceil(n / blocksize)])."""
    n, full = flat.numel(), flat.numel() // blocksize
    packed = flat.new_empty(triton.cdiv(n, 2), dtype=torch.uint8)
    absmax = flat.new_empty(triton.cdiv(n, blocksize), dtype=torch.float32)
    config = CONFIGS["quantize"]
    tile = max(1, config.tile // blocksize)
    with torch.cuda.device_of(flat):
        if full:
            nf4_quantize[(triton.cdiv(full, tile),)](flat, table, packed, absmax, 0, full * blocksize,
                                                     BLOCKSIZE=blocksize, LAST=False, TILE=tile, **config.options())
        if n % blocksize:
            nf4_quantize[(1,)](flat, table, packed, absmax, full, n,
                               BLOCKSIZE=blocksize, LAST=True, TILE=1, **config.options())
    return packed, absmax
