"""Buffers: a group's parameters and gradients as flat tensors: small ones end to end, each large one by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import moments8
from minitune.ops.moments8 import Moment8

ALIGNMENT = 16
"""Every parameter starts at a multiple of 16 elements (64 bytes), where vectorised kernels and libraries want it, and
where cutting the buffer cannot change a result (a kernel's last few elements may round differently). With moments in 8
bits it starts at a multiple of their blocks, so that no block has values of two parameters."""

WHOLE, WHOLE_ON_A_GPU = 1 << 20, 1 << 22
"""Elements from which a parameter is a buffer of its own, where what the host does for a launch is little beside the
update (of a GPU by arithmetic: nobody has measured it). Its gradient need not exist between a step and the next
backward, which is when activations take most."""

UNSIGNED = ("exp_avg_sq",)
"""Moments that are never below 0."""


class Buffer(ABC):
    """What an op updates in one launch: fp32 parameters of one device, their gradients and moments.

    ``data`` and ``grad`` fp32 [n]: parameter i lies in them from ``starts[i]`` on. `in_8_bits`: how moments are kept.
    """

    data: Tensor

    def __init__(self, params: Sequence[torch.nn.Parameter], names: Sequence[str], starts: list[int],
                 in_8_bits: bool) -> None:
        self.params, self.names, self.starts, self.in_8_bits = list(params), list(names), starts, in_8_bits
        self.device, self.shapes = self.params[0].device, [p.shape for p in self.params]
        self.moments: dict[str, Tensor] = {}
        self.moments8: dict[str, Moment8] = {}
        self.steps = torch.zeros(len(self.params), dtype=torch.float32)  # on the host, like torch's own counters
        self.zeros_count = self.keeps = False

    @property
    @abstractmethod
    def grad(self) -> Tensor:
        """The gradients fp32 [n], after `gather`."""

    @abstractmethod
    def zero_grad(self, zeros_count: bool) -> None:
        """Forget all gradients. With `zeros_count` a zero gradient is one; else it is as good as None."""

    @abstractmethod
    def gather(self) -> list[bool]:
        """Bring everything home into ``data`` and ``grad``; tell which parameters have a gradient."""

    def keep_gradients(self, on: bool) -> None:
        """Whether each gradient stays at its address, whatever `zero_grad` does. Those in one buffer do anyway."""
        self.keeps = on

    @abstractmethod
    def release(self) -> None:
        """Give the memory of gradients back that are not needed between two steps."""

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """The place of parameter `i` in a buffer [n], in the parameter's shape."""
        start, shape = self.starts[i], self.shapes[i]
        return buffer[start:start + shape.numel()].view(shape)

    def moment(self, name: str) -> Tensor:
        """The buffer fp32 [n] of that name, zero at first."""
        if name not in self.moments:
            self.moments[name] = torch.zeros(self.starts[-1], dtype=torch.float32, device=self.device)
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
        return {f"{name}_codes": own.codes.view(self.shapes[i]), f"{name}_absmax": own.absmax}

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
        return self.moment8(name).part(slice(start, start + self.shapes[i].numel()))

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

    def _check(self, i: int) -> None:
        """InputError if parameter `i` is not what it was."""
        p, shape = self.params[i], self.shapes[i]
        if p.device != self.device or p.dtype != torch.float32 or p.shape != shape:
            raise InputError(f"{self.names[i]} was {list(shape)} torch.float32 on {self.device} when the optimizer was "
                             f"made and is {list(p.shape)} {p.dtype} on {p.device} now; move or cast the model first, "
                             "then make the optimizer")

    def _dense(self, i: int) -> Tensor | None:
        """The gradient of parameter `i`, if it has one; InputError for a sparse one."""
        grad = self.params[i].grad
        if grad is not None and grad.is_sparse:
            raise InputError(f"{self.names[i]} has a sparse gradient; use a dense one (sparse=False)")
        return grad


class FlatBuffer(Buffer):
    """Moves its parameters into ``data``; each gradient is a view of ``grad``.

    What lies between two parameters is zero and stays zero. The parameter stays the truth: one whose storage was
    replaced (``p.data = …``) is taken in again before the next step.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], names: Sequence[str], in_8_bits: bool = False) -> None:
        alignment = moments8.BLOCK if in_8_bits else ALIGNMENT
        starts = [0, *accumulate(-(-p.numel() // alignment) * alignment for p in params)]
        super().__init__(params, names, starts, in_8_bits)
        self.data = torch.zeros(starts[-1], dtype=torch.float32, device=self.device)
        self._grad = torch.zeros_like(self.data)
        # `.data` gives each view a version counter of its own, which autograd moves when it accumulates: this is how a
        # parameter without a gradient is told from one whose gradient is zero.
        self.data_views = [self.view(self.data, i) for i in range(len(self.params))]
        self.grad_views = [self.view(self._grad, i).data for i in range(len(self.params))]
        self.untouched = [view._version for view in self.grad_views]
        self.addresses = [view.data_ptr() for view in self.data_views]
        for i, p in enumerate(self.params):
            self._take_in(i)
            if p.grad is not None:
                self._copy_gradient(i)
            elif p.requires_grad:
                p.grad = self.grad_views[i]

    @property
    def grad(self) -> Tensor:
        return self._grad

    def zero_grad(self, zeros_count: bool) -> None:
        self._grad.zero_()      # all in one call
        self.zeros_count = zeros_count
        for i, p in enumerate(self.params):
            if p.requires_grad and p.grad is not self.grad_views[i]:
                p.grad = self.grad_views[i]
            self.untouched[i] = self.grad_views[i]._version

    def gather(self) -> list[bool]:
        active = []
        for i, p in enumerate(self.params):
            if p.data_ptr() != self.addresses[i]:
                self._take_in(i)
            if p.grad is None:
                active.append(False)
                continue
            if p.grad is not self.grad_views[i]:
                self._copy_gradient(i)
            active.append(self.zeros_count or self.grad_views[i]._version != self.untouched[i])
        return active

    def release(self) -> None:
        """None: backward adds into it."""

    def _take_in(self, i: int) -> None:
        self._check(i)
        p, place = self.params[i], self.data_views[i]
        place.copy_(p.data)
        p.data = place

    def _copy_gradient(self, i: int) -> None:
        grad = self._dense(i)
        assert grad is not None
        self.grad_views[i].copy_(grad.detach())
        self.params[i].grad = self.grad_views[i]


class WholeTensor(Buffer):
    """One large parameter where it lies, with the gradient that autograd gives it.

    Between `zero_grad` and the next backward there is no gradient, so that its memory serves the forward pass, and the
    first backward's needs neither zeros nor a sum: it becomes the gradient as it is.
    """

    def __init__(self, param: torch.nn.Parameter, name: str, in_8_bits: bool = False) -> None:
        super().__init__([param], [name], [0, param.numel()], in_8_bits)
        self.param = param
        self.untouched = -1
        self.kept: Tensor | None = None
        self._take()

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad.view(-1)

    @torch.no_grad()
    def zero_grad(self, zeros_count: bool) -> None:
        p, self.zeros_count = self.param, zeros_count
        if not self.keeps and not zeros_count:
            p.grad = None
            return
        grad = p.grad if self.kept is None else self.kept
        if grad is not None:
            p.grad = grad.zero_().detach() if grad.requires_grad else grad.zero_()
        elif p.requires_grad:
            p.grad = torch.zeros_like(p.data)
        self._keep()

    def gather(self) -> list[bool]:
        self._take()
        grad = self._dense(0)
        if grad is None:
            return [False]
        if self.kept is not None:
            if grad is not self.kept:
                self.param.grad = self.kept.copy_(grad.detach())
            return [self.zeros_count or self.kept._version != self.untouched]
        if grad.is_inference() or not grad.is_contiguous():
            self.param.grad = grad.detach().clone(memory_format=torch.contiguous_format)
        elif grad.requires_grad:
            self.param.grad = grad.detach()
        return [True]

    def keep_gradients(self, on: bool) -> None:
        if on == self.keeps:
            return
        p, self.keeps, self.kept = self.param, on, None
        if on and p.grad is not None:
            self.kept = p.grad = p.grad.detach().contiguous()
            self.untouched = -1         # it counts already
        elif on and p.requires_grad:
            p.grad = torch.zeros_like(p.data)
            self._keep()

    def release(self) -> None:
        if not self.keeps:
            self.param.grad = None

    def _keep(self) -> None:
        """The gradient that is there now stays, if they do, and as it is it is none."""
        grad = self.param.grad
        if grad is not None:
            self.untouched = grad._version
            self.kept = grad if self.keeps else None

    def _take(self) -> None:
        self._check(0)
        if not self.param.is_contiguous():
            self.param.data = self.param.data.contiguous()
        self.data = self.param.data.view(-1)


def buffers_of(params: Sequence[torch.nn.Parameter], names: Sequence[str], in_8_bits: bool) -> list[Buffer]:
    """The buffers for one group's parameters, which may lie on several devices: for each device one of the small ones,
    and one for each large one. InputError where two share memory."""
    _refuse_shared_memory(params, names)
    found: list[Buffer] = []
    for device in dict.fromkeys(p.device for p in params):
        own = [i for i, p in enumerate(params) if p.device == device]
        small = [i for i in own if not is_whole(params[i])]
        if small:
            found.append(FlatBuffer([params[i] for i in small], [names[i] for i in small], in_8_bits))
        found += [WholeTensor(params[i], names[i], in_8_bits) for i in own if is_whole(params[i])]
    return found


def is_whole(p: Tensor) -> bool:
    """Whether a parameter is so large that it is a buffer of its own."""
    return p.numel() >= (WHOLE if p.device.type == "cpu" else WHOLE_ON_A_GPU)


def _refuse_shared_memory(params: Sequence[Tensor], names: Sequence[str]) -> None:
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
                   for p, name in zip(params, names, strict=True) if p.numel() and p.is_contiguous())
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise InputError(f"{name} and {other} share memory but are two parameters; the optimizer would tear them "
                             "apart. Make them one parameter")
