"""nf4_linear: x·Wᵀ + bias with W in NF4, decoded into one buffer that all weights share, in the forward and again in
the backward.

Autograd never sees the buffer. It would keep a reference, the next weight would be decoded over it, and the gradient
would silently be that of another weight. So every product on a quantised weight is inside an autograd function that
keeps the packed weight: this one, or a layer's half (`model/half.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune.ops.nf4 import NF4Weight


class DecodeBuffer:
    """Room for one decoded weight on each device, grown to the largest that was asked for. What `take` gave is
    overwritten by the next one who takes it: use it up before."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._rooms: dict[torch.device, Tensor] = {}

    def take(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[rows, columns], contiguous, with old content."""
        if device not in self._rooms or self._rooms[device].numel() < rows * columns:
            self._rooms.pop(device, None)      # first give back, then take: never two at once
            self._rooms[device] = torch.empty(rows * columns, dtype=self.dtype, device=device)
        return self._rooms[device][: rows * columns].view(rows, columns)


class FusedNF4:
    """Several linears that share their input, below each other as one weight [N, K]; each keeps its own blocks and its
    own nested offset, as its checkpoint has them. A part that a checkpoint left in 16 bits is a plain tensor."""

    def __init__(self, parts: Sequence[NF4Weight | Tensor], buffer: DecodeBuffer):
        self.parts, self.buffer = tuple(parts), buffer
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    def decode(self, out: Tensor | None = None) -> Tensor:
        """[N, K] in `out`, or else in the buffer, valid until the buffer is taken again."""
        out = self.buffer.take(*self.shape, self.device) if out is None else out
        start = 0
        for part in self.parts:
            rows = out[start : start + part.shape[0]]
            if isinstance(part, NF4Weight):
                part.dequantize(out=rows)
            else:
                rows.copy_(part)
            start += part.shape[0]
        return out

    def to(self, device: torch.device) -> FusedNF4:
        """The same on another device, with the same buffer."""
        return FusedNF4([part.to(device) for part in self.parts], self.buffer)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def __len__(self) -> int:
        return int(self.shape[0])


def dense(weight: Tensor | FusedNF4) -> Tensor:
    """The weight as a tensor [N, K] for one product; a quantised one is decoded for it."""
    return weight.decode() if isinstance(weight, FusedNF4) else weight


def reference(x: Tensor, weight: FusedNF4, bias: Tensor | None = None) -> Tensor:
    """x [T, K] -> [T, N]: what it means, differentiable by autograd, each weight in memory of its own."""
    whole = torch.cat([part.dequantize(x.dtype) if isinstance(part, NF4Weight) else part for part in weight.parts])
    return torch.nn.functional.linear(x, whole, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FusedNF4, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.decode(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        return (dy @ ctx.weight.decode() if ctx.needs_input_grad[0] else None), None, None


def nf4_linear(x: Tensor, weight: FusedNF4, bias: Tensor | None = None) -> Tensor:
    """x [T, K] in the buffer's dtype -> [T, N], differentiable in x; weight and bias are frozen."""
    out: Tensor = _Linear.apply(x, weight, bias)
    return out
