"""FlatBuffer: one group's parameters and gradients on one device, laid end to end, so an op sees one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minitune.errors import InputError

ALIGNMENT = 16
"""Every parameter starts at a multiple of 16 elements (64 bytes), where vectorised kernels and libraries want it, and
where cutting the buffer cannot change a result (a kernel's last few elements may round differently)."""


class FlatBuffer:
    """Moves fp32 parameters of one device into ``data`` fp32 [n]; each gradient is a view of ``grad`` fp32 [n].

    What lies between two parameters is zero and stays zero. The parameter stays the truth: one whose storage was
    replaced (``p.data = …``) is taken in again before the next step.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], names: Sequence[str]) -> None:
        self.params, self.names = list(params), list(names)
        self.device = self.params[0].device
        self.starts = [0]
        for p in self.params:
            self.starts.append(self.starts[-1] + -(-p.numel() // ALIGNMENT) * ALIGNMENT)
        _refuse_shared_memory(self.params, self.names)
        self.data = torch.zeros(self.starts[-1], dtype=torch.float32, device=self.device)
        self.grad = torch.zeros_like(self.data)
        self.moments: dict[str, Tensor] = {}
        self.steps = torch.zeros(len(self.params), dtype=torch.float32)  # on the host, like torch's own counters
        self.zeros_count = False
        # `.data` gives each view a version counter of its own, which autograd moves when it accumulates: this is how a
        # parameter without a gradient is told from one whose gradient is zero.
        self.data_views = [self.view(self.data, i) for i in range(len(self.params))]
        self.grad_views = [self.view(self.grad, i).data for i in range(len(self.params))]
        self.untouched = [view._version for view in self.grad_views]
        self.addresses = [view.data_ptr() for view in self.data_views]
        for i, p in enumerate(self.params):
            self._take_in(i)
            if p.grad is not None:
                self._copy_gradient(i, p.grad)
            elif p.requires_grad:
                p.grad = self.grad_views[i]

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """The place of parameter `i` in a buffer [n], in the parameter's shape."""
        p = self.params[i]
        return buffer[self.starts[i]:self.starts[i] + p.numel()].view(p.shape)

    def moment(self, name: str) -> Tensor:
        """The buffer fp32 [n] of that name, zero at first."""
        if name not in self.moments:
            self.moments[name] = torch.zeros_like(self.data)
        return self.moments[name]

    def zero_grad(self, zeros_count: bool) -> None:
        """Zero all gradients in one call. With `zeros_count` a zero gradient is one; else it is as good as None."""
        self.grad.zero_()
        self.zeros_count = zeros_count
        for i, p in enumerate(self.params):
            if p.requires_grad and p.grad is not self.grad_views[i]:
                p.grad = self.grad_views[i]
            self.untouched[i] = self.grad_views[i]._version

    def gather(self) -> list[bool]:
        """Bring everything home into ``data`` and ``grad``; tell which parameters have a gradient."""
        active = []
        for i, p in enumerate(self.params):
            if p.data_ptr() != self.addresses[i]:
                self._take_in(i)
            grad = p.grad
            if grad is None:
                active.append(False)
                continue
            if grad is not self.grad_views[i]:
                self._copy_gradient(i, grad)
            active.append(self.zeros_count or self.grad_views[i]._version != self.untouched[i])
        return active

    def runs(self, active: Sequence[bool], key: Callable[[int], object]) -> Iterator[tuple[int, slice]]:
        """Cut the buffer into the longest runs of active parameters with equal `key`: (first parameter, slice).

        As a rule every parameter is active and the keys are equal: one run, one launch.
        """
        first: int | None = None
        for i in range(len(self.params) + 1):
            inside = i < len(self.params) and active[i]
            if first is not None and not (inside and key(i) == key(first)):
                yield first, slice(self.starts[first], self.starts[i])
                first = None
            if inside and first is None:
                first = i

    def _take_in(self, i: int) -> None:
        p, place = self.params[i], self.data_views[i]
        if p.device != self.device or p.dtype != torch.float32 or p.shape != place.shape:
            raise InputError(f"{self.names[i]} was {list(place.shape)} torch.float32 on {self.device} when the "
                             f"optimizer was made and is {list(p.shape)} {p.dtype} on {p.device} now; move or cast "
                             "the model first, then make the optimizer")
        place.copy_(p.data)
        p.data = place

    def _copy_gradient(self, i: int, grad: Tensor) -> None:
        if grad.is_sparse:
            raise InputError(f"{self.names[i]} has a sparse gradient; use a dense one (sparse=False)")
        self.grad_views[i].copy_(grad.detach())
        self.params[i].grad = self.grad_views[i]


def _refuse_shared_memory(params: Sequence[Tensor], names: Sequence[str]) -> None:
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
                   for p, name in zip(params, names, strict=True) if p.numel() and p.is_contiguous())
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise InputError(f"{name} and {other} share memory but are two parameters; the optimizer would tear them "
                             "apart. Make them one parameter")
