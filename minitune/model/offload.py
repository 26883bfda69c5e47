"""Parking: tensors that leave the GPU's memory for pinned host memory between forward and backward.

Copies run on a stream of their own beside the computation. In the backward, which asks for them in the reverse order,
the next one is on its way while the last one is worked on. On a CPU the same happens with plain copies.

All memory of the device belongs to the computing stream, which waits for a copy before memory that it reads or writes
is given back. `record_stream` would leave that to the allocator, which learns of it late: the host runs layers ahead,
and would find none of their memory free.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.model.memory import free_bytes, pinned_bytes

RESERVE = 256 << 20
"""Bytes of the host's memory that parking leaves to others."""


class Ticket:
    """One parked tensor: where it lies on the host, who was parked before it, and its way back, once that began.

    The backward's graph holds it; the parking does not, so that a graph which is dropped takes its tickets along.
    """

    def __init__(self, host: Tensor, device: torch.device, before: weakref.ref[Ticket] | None):
        self.host: Tensor | None = host
        self.device, self.before = device, before
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.owner: torch.cuda.Stream | None = None     # of the memory of `back`

    def __del__(self) -> None:
        if self.back is not None and self.owner is not None and self.arrived is not None and not sys.is_finalizing():
            self.owner.wait_event(self.arrived)     # on its way to whom nobody fetches any more


class Parking:
    """Where the layers' inputs of a pass lie. Host buffers are used again and again, step after step."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._newest: weakref.ref[Ticket] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: tuple[Tensor, torch.cuda.Event, torch.cuda.Stream] | None = None

    def park(self, x: Tensor) -> Ticket:
        """Begin to copy x to the host; its own memory is free when the next one is parked, or the first one fetched,
        and nobody else holds it."""
        self._let_go()
        if (x.shape, x.dtype) not in self._free:        # a pass of another length: its buffers alone are kept
            self._free = {(x.shape, x.dtype): []}
        free = self._free[x.shape, x.dtype]
        host = free.pop() if free else _room(x)
        if x.device.type == "cuda":
            stream = self._stream(x.device)
            owner = torch.cuda.current_stream(x.device)
            stream.wait_stream(owner)
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
            self._leaving = x, _mark(stream), owner
        else:
            host.copy_(x)
        ticket = Ticket(host, x.device, self._newest)
        self._newest = weakref.ref(ticket)
        return ticket

    def fetch(self, ticket: Ticket, last: bool) -> Tensor:
        """The tensor, on its device again; the one that was parked before it sets out. With `last` the host buffer is
        given up, and a second fetch is an error."""
        self._let_go()
        self._begin(ticket)
        back, ticket.back = ticket.back, None
        if back is None or ticket.host is None:
            raise RuntimeError("this layer's input was given up after its backward; pass retain_graph=True there")
        if ticket.arrived is not None:
            torch.cuda.current_stream(ticket.device).wait_event(ticket.arrived)
        before = None if ticket.before is None else ticket.before()
        if before is not None:
            self._begin(before)
        if last:
            # Copies into this buffer and out of it share a stream, so the next one waits for the one under way.
            free = self._free.get((ticket.host.shape, ticket.host.dtype))
            if free is not None:
                free.append(ticket.host)
            ticket.host = None
        return back

    def _begin(self, ticket: Ticket) -> None:
        """Begin the way back, if it has not begun and something is there."""
        if ticket.back is not None or ticket.host is None:
            return
        ticket.back = torch.empty_like(ticket.host, device=ticket.device)
        if ticket.device.type != "cuda":
            ticket.back.copy_(ticket.host)
            return
        stream = self._stream(ticket.device)
        ticket.owner = torch.cuda.current_stream(ticket.device)
        stream.wait_stream(ticket.owner)        # who had this memory before may still read it
        with torch.cuda.stream(stream):
            ticket.back.copy_(ticket.host, non_blocking=True)
        ticket.arrived = _mark(stream)

    def _let_go(self) -> None:
        """Give up the tensor that was parked last, whose copy had a layer's time to end."""
        if self._leaving is not None:
            _, done, owner = self._leaving
            owner.wait_event(done)
            self._leaving = None

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def __reduce__(self) -> tuple[type[Parking], tuple[()]]:
        return Parking, ()      # a copy of a model parks for itself


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """A point behind all that `stream` has to do now."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _room(x: Tensor) -> Tensor:
    """A host buffer like x, pinned for a GPU. InputError where it does not fit: pinned memory cannot be swapped out, so
    a system that runs short of it ends processes."""
    free, taken = free_bytes(torch.device("cpu")), pinned_bytes(x.nbytes) if x.device.type == "cuda" else x.nbytes
    if taken + RESERVE > free:
        raise InputError(f'memory "offload": a layer\'s input takes {taken / 1e6:,.0f} MB of host memory, and '
                         f'{free / 1e6:,.0f} MB are free; take shorter micro-batches, or memory="full"')
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
