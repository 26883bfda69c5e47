"""lora_gradients: a Triton kernel that gives one adapter its gradients, fp32 and side by side, out of a projection's.

The products for all parts of a projection leave dA and dB in the compute dtype and, of dB, the transpose. Here a part's
rows and ranks are taken out, cast, and dB turned and scaled: one launch in the place of a cast, a cast and a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

CONFIGS: dict[str, dict[int, Config]] = {
    "apart": {80: Config({"TILE": 2048}, num_warps=4, registers=64, shared=9 << 10)},
}
"""TILE: values that a program moves."""


@triton.jit(do_not_specialize=["scale"])
def lora_gradients_apart(da, db, out_a, out_b, scale, A_VALUES, N, row_step, rank_step, R: tl.constexpr,
                         RANK: tl.constexpr, TILE: tl.constexpr):
    """The first programs copy dA, A_VALUES side by side; each of the others takes TILE / RANK rows of dB."""
    program = tl.program_id(0)
    first = 0
    if da is not None:
        first = tl.cdiv(A_VALUES, TILE)
        if program < first:
            at = program * TILE + tl.arange(0, TILE)
            tl.store(out_a + at, tl.load(da + at, mask=at < A_VALUES, other=0).to(tl.float32), mask=at < A_VALUES)
    if program >= first:
        row = ((program - first) * (TILE // RANK) + tl.arange(0, TILE // RANK))[:, None]
        rank = tl.arange(0, RANK)[None, :]
        live = (row < N) & (rank < R)
        values = tl.load(db + row * row_step + rank * rank_step, mask=live, other=0).to(tl.float32)
        tl.store(out_b + row * R + rank, values * scale, mask=live)


def apart(da: Tensor, db: Tensor, scale: float, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """da [r, K], contiguous, and db [n, r] with any strides, in one dtype -> (da, scale · db), fp32 and contiguous.
    A da in fp32 is given back as it is.
    """
    (n, rank), wide = db.shape, da.dtype == torch.float32
    config = config or pick(CONFIGS["apart"], db.device)
    tile, lanes = config.tiles["TILE"], triton.next_power_of_2(rank)
    assert da.is_contiguous() and lanes <= tile and max(da.numel(), sum(
        (size - 1) * step for size, step in zip(db.shape, db.stride(), strict=True))) < 2**31 - tile
    out_b = torch.empty(n, rank, dtype=torch.float32, device=db.device)
    out_a = da if wide else torch.empty(da.shape, dtype=torch.float32, device=da.device)
    programs = triton.cdiv(n, tile // lanes) + (0 if wide else triton.cdiv(da.numel(), tile))
    if programs:
        with torch.cuda.device_of(db):
            lora_gradients_apart[(programs,)](
                None if wide else da, db, None if wide else out_a, out_b, scale, da.numel(), n, *db.stride(), R=rank,
                RANK=lanes, **config.arguments())
    return out_a, out_b
