"""augmented: LoRA within the library's own product, over operands that hold the adapters in their margins.

The weight lies in a buffer [N + R', K + R'] with s·B behind its rows and A below them; the op that makes x leaves room
for S behind each row of x. Then x·Wᵀ + S·Bᵀ is one product of depth K + R', and dy·W + dS·A one of depth N + R': no
second pass over y or dx, for R'/K more arithmetic. R' is the rank rounded up until rows are multiples of 128 bytes.

                 K      R'                     K   R'                             N   R'
    whole = N  [ W     s·B ]        x_rows = [ x | S ]  [T, K + R']    dy_rows = [ dy | dS ]  [T, N + R']
            R' [ A      0  ]        y = x_rows · whole[:N]ᵀ            dx = dy_rows · whole[:, :K]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from minitune.ops import huge_pages, products
from minitune.ops.nf4_linear import FusedNF4

ROW_BYTES = 128


class Augmented:
    """A frozen weight [N, K] laid out for margins: a dense one within its buffer for good, one in NF4 when decoded.

    A dense one's margins hold the images that were put there last (`fill`), so whoever holds other images, as a pass
    before an optimizer step, must not use them (`holds`).
    """

    def __init__(self, weight: Tensor | FusedNF4, rank: int, dtype: torch.dtype):
        lanes = ROW_BYTES // dtype.itemsize
        self.n_rows, self.columns = weight.shape
        self.room = -(-rank // lanes) * lanes
        self.nf4: FusedNF4 | None = None
        self.filled: Tensor | None = None
        if isinstance(weight, FusedNF4):
            self.nf4 = weight
            return
        self.whole = weight.new_empty(self.n_rows + self.room, self.columns + self.room)
        huge_pages.ask([self.whole])
        self.whole.zero_()
        self.weight = self.whole[: self.n_rows, : self.columns]
        self.weight.copy_(weight)

    def fill(self, a: Tensor, b: Tensor) -> None:
        """Put the images a [R, K] and b [N, R] into a dense weight's margins."""
        if self.nf4 is None:
            self._fill(self.whole, a, b)
            self.filled = a

    def holds(self, a: Tensor | None) -> bool:
        """Whether the margins are those of image `a`."""
        return a is not None and (self.nf4 is not None or self.filled is a)

    @contextlib.contextmanager
    def holding(self, a: Tensor, b: Tensor) -> Iterator[Tensor]:
        """whole [N + R', K + R'], for the product within the block."""
        if self.nf4 is None:
            yield self.whole
            return
        with self.nf4.decoded(self.room) as whole:
            whole[self.n_rows :].zero_()
            whole[: self.n_rows, self.columns :].zero_()
            self._fill(whole, a, b)
            yield whole

    def _fill(self, whole: Tensor, a: Tensor, b: Tensor) -> None:
        whole[self.n_rows : self.n_rows + len(a), : self.columns] = a
        whole[: self.n_rows, self.columns : self.columns + len(a)] = b


def rows(n: int, columns: int, room: int, like: Tensor) -> Tensor:
    """[n, columns] with room behind each row, uninitialised, dtype and device as `like`."""
    return like.new_empty(n, columns + room)[:, :columns]


def tail(x: Tensor, room: int) -> Tensor | None:
    """The room [n, room] behind the rows of x [n, columns], if x was made by `rows`; else None."""
    if len(x) < 2 or x.stride(0) != x.shape[1] + room:      # the stride of a single row says nothing
        return None
    return x.as_strided((len(x), room), (x.stride(0), 1), x.storage_offset() + x.shape[1])


def joined(x: Tensor, behind: Tensor, s: Tensor) -> Tensor:
    """[x | S] after S [n, R] was written `behind` x, its tail; what lies behind S becomes zero, for what meets a zero
    must be a number."""
    behind[:, : s.shape[1]] = s
    behind[:, s.shape[1] :] = 0
    return x.as_strided((len(x), x.stride(0)), (x.stride(0), 1), x.storage_offset())


def forward(x: Tensor, whole: Tensor, n_rows: int, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """x = [x | S] -> [x | S] · [W | s·B]ᵀ + bias [n, N]."""
    right = whole[:n_rows].mT
    if bias is None:
        return products.mm(x, right, out)
    return torch.addmm(bias, x, right) if out is None else torch.addmm(bias, x, right, out=out)


def backward_input(dy: Tensor, whole: Tensor, columns: int) -> Tensor:
    """dy = [dy | dS] -> [dy | dS] · [W over A] [n, K]."""
    return products.mm(dy, whole[:, :columns])
