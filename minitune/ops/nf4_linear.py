"""nf4_linear: x·Wᵀ + bias with W in NF4, decoded into memory that all weights share, in the forward and again in the
backward.

Autograd must not save what was decoded: on a CPU the next weight is decoded over it (its version counter makes plain
autograd stop there), on a GPU it would stay there in 16 bits for each layer. So every product on a quantised weight
is inside an autograd function that keeps the packed weight: this one, or a layer's half (`model/half.py`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.ops import backends, few_rows
from minitune.ops.nf4 import NF4Weight, operands
from minitune.ops.once import once


class DecodeBuffer:
    """Room for one decoded weight: on a CPU, where fresh memory is slow, one buffer, grown to the largest that was
    asked for. On a GPU torch's allocator hands out what the last product gave back, on its stream, and whatever runs
    between two products can use it meanwhile.

    What `take` gave on a CPU is overwritten by the next one who takes it. `lock` is held from there to the end of the
    product (`FusedNF4.decoded`), so that threads which share a model take turns.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.lock = threading.RLock()
        self._room: Tensor | None = None

    def take(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[rows, columns], contiguous, with old content."""
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=self.dtype, device=device)
        if self._room is None or self._room.numel() < rows * columns:
            self._room = None       # first give back, then take: never two at once
            with torch.inference_mode(False):       # else a buffer made there could not be written outside
                self._room = torch.empty(rows * columns, dtype=self.dtype)
        return self._room[: rows * columns].view(rows, columns)

    def __reduce__(self) -> tuple[type[DecodeBuffer], tuple[torch.dtype]]:
        return DecodeBuffer, (self.dtype,)      # a copy of a model has a buffer and a lock of its own


class FusedNF4:
    """Several linears that share their input, below each other as one weight [N, K]; each keeps its own blocks and its
    own nested offset, as its checkpoint has them. A part that a checkpoint left in 16 bits is a plain tensor."""

    def __init__(self, parts: Sequence[NF4Weight | Tensor], buffer: DecodeBuffer):
        self.parts, self.buffer = tuple(parts), buffer
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    @contextlib.contextmanager
    def decoded(self, room: int = 0) -> Iterator[Tensor]:
        """[N + room, K + room], the weight in its first corner, for the product within the block alone."""
        rows, columns = self.shape
        with self.buffer.lock:
            whole = self.buffer.take(rows + room, columns + room, self.device)
            self.decode(whole[:rows, :columns])
            yield whole

    def decode(self, out: Tensor) -> Tensor:
        """Fill `out` [N, K] and return it."""
        start = 0
        for part in self.parts:
            rows = out[start : start + part.shape[0]]
            if isinstance(part, NF4Weight):
                part.dequantize(out=rows)
            else:
                rows.copy_(part)
            start += part.shape[0]
        return out

    def reads_packed(self, dtype: torch.dtype) -> bool:
        """Whether `vector_product` is there for x in dtype: on a CPU with the extension, in fp32 and bf16."""
        return (self.device.type == "cpu" and dtype in backends.ROWS_DTYPES
                and backends.choose("nf4", self.device) == "native")

    def vector_product(self) -> Callable[[Tensor, Tensor], None]:
        """What writes the weight times x [K] into y [N], contiguous, as decoding and `few_rows` would, but reads the
        packed weight and writes no other."""
        bounds = [0, *itertools.accumulate(part.shape[0] for part in self.parts)]
        products = [functools.partial(torch.ops.minitune.nf4_product.default, *operands(part))
                    if isinstance(part, NF4Weight) else few_rows.vector_product(part) for part in self.parts]

        def product(x: Tensor, y: Tensor) -> None:
            for each, first, last in zip(products, bounds, bounds[1:], strict=False):
                each(x, y[first:last])

        return product

    def to(self, device: torch.device) -> FusedNF4:
        """The same on another device, with the same buffer."""
        return FusedNF4([part.to(device) for part in self.parts], self.buffer)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def __len__(self) -> int:
        return int(self.shape[0])


def reference(x: Tensor, weight: FusedNF4, bias: Tensor | None = None) -> Tensor:
    """x [T, K] -> [T, N]: what it means, differentiable by autograd, each weight in memory of its own."""
    whole = torch.cat([part.dequantize(x.dtype) if isinstance(part, NF4Weight) else part for part in weight.parts])
    return torch.nn.functional.linear(x, whole, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FusedNF4, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        with weight.decoded() as dense:
            return torch.nn.functional.linear(x, dense, bias)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        with ctx.weight.decoded() as dense:
            return dy @ dense, None, None


def nf4_linear(x: Tensor, weight: FusedNF4, bias: Tensor | None = None) -> Tensor:
    """x [T, K] in the buffer's dtype -> [T, N], differentiable in x; weight and bias are frozen."""
    out: Tensor = _Linear.apply(x, weight, bias)
    return out
