"""one_row: one token through all layers on a CPU, each op called directly and into memory that is made once.

Decoding one sequence reads every weight once; beside that, what a step costs is the calls themselves. So nothing is
decided, allocated or kept here that a step need not: the same ops in the same order as the halves of a layer take for
one row, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.ops import backends, few_rows, lora_matmul
from minitune.ops.lora_matmul import LoraWeights


class LayerWeights(NamedTuple):
    """What one layer reads. The norms' weights lie in the compute dtype; q_norm and k_norm [head_dim] may be None;
    window: how many keys a query sees, None for all."""

    norm: Tensor
    qkv: LoraWeights
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LoraWeights
    mlp_norm: Tensor
    gate_up: LoraWeights
    down: LoraWeights
    window: int | None


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and the norms' eps."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    eps: float


def fits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the extension's row ops are there for it."""
    probe = torch.empty(1, 1, dtype=dtype, device=device)
    return device.type == "cpu" and all(backends.by_rows(op, probe) for op in ("rms_norm", "rope", "swiglu"))


class OneRow:
    """The layers and the final norm, with the adapters as they stand now.

    `step` may be called where `fits` says so; its result is overwritten by the next step.
    """

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, shape: Shape, dtype: torch.dtype):
        s = shape
        self.norm, self.eps = norm, s.eps
        rotated = s.n_heads + s.n_kv_heads
        self.rstd, self.head_rstd = (torch.empty(shape, dtype=torch.float32) for shape in ((1, 1), (1, rotated, 1)))
        self.total, self.mlp_total, self.branch, self.normed = (torch.empty(1, s.d_model, dtype=dtype)
                                                                for _ in range(4))
        self.qkv = torch.empty(1, (rotated + s.n_kv_heads) * s.head_dim, dtype=dtype)
        self.gate_up, self.h = torch.empty(1, 2 * s.d_ff, dtype=dtype), torch.empty(1, s.d_ff, dtype=dtype)
        heads = self.qkv.view(1, -1, s.head_dim)
        self.raw, self.v = heads[:, :rotated], heads[:, rotated:]
        has_norms = layers[0].q_norm is not None
        self.qk = torch.empty(1, rotated, s.head_dim, dtype=dtype) if has_norms else self.raw
        self.k = self.qk[:, s.n_heads:]
        self.q = self.qk[:, : s.n_heads].view(1, s.n_kv_heads, -1, s.head_dim)      # heads that share a key: as queries
        self.q_heads = slice(0, s.n_heads), slice(s.n_heads, rotated)
        self.layers = [(w, _product(w.qkv, self.qkv), _product(w.o, self.branch), _product(w.gate_up, self.gate_up),
                        _product(w.down, self.branch)) for w in layers]
        self.flat_normed, self.flat_h = self.normed.view(-1), self.h.view(-1)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
             place: int) -> Tensor:
        """x [1, d_model], an embedding -> hidden [1, d_model]. cos and sin fp32 [1, head_dim / 2] of `place`, where the
        new keys and values are written: [1, kv_heads, capacity, head_dim] of each layer, filled up to there."""
        rows = torch.ops.minitune
        rms_norm, rope, swiglu = rows.rows_rms_norm.default, rows.rows_rope.default, rows.rows_swiglu.default
        branch = total = None
        for layer, (w, qkv, o, gate_up, down) in enumerate(self.layers):
            rms_norm(x, branch, w.norm, self.eps, False, self.rstd, total, self.normed)
            x = x if total is None else total
            qkv(self.flat_normed)
            if w.q_norm is not None and w.k_norm is not None:
                for heads, weight in zip(self.q_heads, (w.q_norm, w.k_norm), strict=True):
                    rms_norm(self.raw[:, heads], None, weight, self.eps, False, self.head_rstd[:, heads], None,
                             self.qk[:, heads])
            rope(self.qk, cos, sin, False)
            keys[layer].select(2, place).copy_(self.k)
            values[layer].select(2, place).copy_(self.v)
            first = 0 if w.window is None else max(0, place + 1 - w.window)
            attended = F.scaled_dot_product_attention(self.q, keys[layer].narrow(2, first, place + 1 - first),
                                                      values[layer].narrow(2, first, place + 1 - first))
            o(attended.reshape(-1))
            rms_norm(x, self.branch, w.mlp_norm, self.eps, False, self.rstd, self.mlp_total, self.normed)
            gate_up(self.flat_normed)
            swiglu(self.gate_up, self.h)
            down(self.flat_h)
            x, branch, total = self.mlp_total, self.branch, self.total
        rms_norm(x, branch, self.norm, self.eps, False, self.rstd, total, self.normed)
        return self.normed


def _product(w: LoraWeights, y: Tensor) -> Callable[[Tensor], None]:
    """x [K] -> None; y [1, N] becomes the product of `lora_matmul.forward`."""
    weight, bias, a, b = w.weight, w.bias, w.a, w.b
    reads_packed = isinstance(weight, Tensor) or weight.reads_packed(y.dtype)
    if not reads_packed or w.packed is not None or w.gain is not None:
        def general(x: Tensor) -> None:
            y.copy_(lora_matmul.forward(x[None], w)[0])

        return general
    flat = y.view(-1)
    write = few_rows.vector_product(weight) if isinstance(weight, Tensor) else weight.vector_product()

    def product(x: Tensor) -> None:
        write(x, flat)
        if bias is not None:
            y.add_(bias)
        if a is not None and b is not None:
            y.addmm_(x[None] @ a.mT, b.mT)

    return product
