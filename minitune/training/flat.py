"""FlatBuffer: one group's parameters and gradients on one device, laid end to end, so an op sees one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import moments8
from minitune.ops.moments8 import Moment8

ALIGNMENT = 16
"""Every parameter starts at a multiple of 16 elements (64 bytes), where vectorised kernels and libraries want it, and
where cutting the buffer cannot change a result (a kernel's last few elements may round differently). With moments in 8
bits it starts at a multiple of their blocks, so that no block has values of two parameters."""

UNSIGNED = ("exp_avg_sq",)
"""Moments that are never below 0."""


class FlatBuffer:
    """Moves fp32 parameters of one device into ``data`` fp32 [n]; each gradient is a view of ``grad`` fp32 [n].

    What lies between two parameters is zero and stays zero. The parameter stays the truth: one whose storage was
    replaced (``p.data = …``) is taken in again before the next step. `in_8_bits`: how the moments are kept.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], names: Sequence[str], in_8_bits: bool = False) -> None:
        self.params, self.names = list(params), list(names)
        self.device = self.params[0].device
        self.in_8_bits = in_8_bits
        alignment = moments8.BLOCK if in_8_bits else ALIGNMENT
        self.starts = [0]
        for p in self.params:
            self.starts.append(self.starts[-1] + -(-p.numel() // alignment) * alignment)
        _refuse_shared_memory(self.params, self.names)
        self.data = torch.zeros(self.starts[-1], dtype=torch.float32, device=self.device)
        self.grad = torch.zeros_like(self.data)
        self.moments: dict[str, Tensor] = {}
        self.moments8: dict[str, Moment8] = {}
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

    def moment8(self, name: str) -> Moment8:
        """The same in 8 bits."""
        if name not in self.moments8:
            self.moments8[name] = moments8.zeros(self.starts[-1], name not in UNSIGNED, self.device)
        return self.moments8[name]

    def state(self, name: str, i: int) -> dict[str, Tensor]:
        """The moment `name` of parameter `i` as views: `name` in fp32, or `name`_codes and `name`_absmax in 8 bits."""
        if not self.in_8_bits:
            return {name: self.view(self.moment(name), i)}
        own = self._own_moment8(name, i)
        return {f"{name}_codes": own.codes.view(self.params[i].shape), f"{name}_absmax": own.absmax}

    def load_state(self, name: str, i: int, entry: Mapping[str, Tensor]) -> None:
        """Take the moment `name` of parameter `i` from what `state` gave, converted where it was kept in the other
        way; zero where `entry` has none."""
        p, values, codes = self.params[i], entry.get(name), entry.get(f"{name}_codes")
        if values is None and codes is None:
            if name not in {*self.moments, *self.moments8}:
                return
            values = torch.zeros_like(p)
        if codes is not None:
            # torch's load_state_dict has made the codes fp32, which holds them exactly
            stored = Moment8(codes.reshape(-1).to(self.device, torch.uint8),
                             entry[f"{name}_absmax"].to(self.device, torch.float32), name not in UNSIGNED)
            if self.in_8_bits:
                own = self._own_moment8(name, i)
                own.codes.copy_(stored.codes)
                own.absmax.copy_(stored.absmax)
                return
            values = moments8.decode(stored).view(p.shape)
        assert values is not None
        if self.in_8_bits:
            moments8.encode_(self._own_moment8(name, i), values.reshape(-1).to(self.device, torch.float32))
        else:
            self.view(self.moment(name), i).copy_(values)

    def _own_moment8(self, name: str, i: int) -> Moment8:
        start = self.starts[i]
        return self.moment8(name).part(slice(start, start + self.params[i].numel()))

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
