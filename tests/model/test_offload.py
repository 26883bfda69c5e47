"""Parking: what does not fit into the host's memory is said before it is taken."""

import pytest
import torch

from minitune.errors import InputError
from minitune.model import memory, offload


def test_pinned_memory_is_counted_as_torch_takes_it():
    assert [memory.pinned_bytes(n) for n in (1, 2, 3, 4096, 81_920_000)] == [1, 2, 4, 4096, 2**27]


def test_a_host_without_room_is_said_and_buffers_at_hand_need_none(monkeypatch):
    free = [10 << 30]
    monkeypatch.setattr(offload, "free_bytes", lambda device: free[0])
    parking, x = offload.Parking(), torch.randn(8, 4)
    ticket = parking.park(x)
    assert torch.equal(parking.fetch(ticket, last=True), x)
    free[0] = offload.RESERVE + x.nbytes - 1
    again = parking.park(x + 1)         # into the buffer that the first one gave back
    with pytest.raises(InputError, match=r'memory "offload": a layer.s input takes 0 MB of host memory, and 268 MB'):
        parking.park(x)
    assert torch.equal(parking.fetch(again, last=True), x + 1)


def test_of_what_is_parked_the_next_one_sets_out_and_nothing_stays_behind():
    parking, tensors = offload.Parking(), [torch.randn(8, 4) for _ in range(3)]
    first, second, third = tickets = [parking.park(x) for x in tensors]
    assert torch.equal(parking.fetch(third, last=True), tensors[2])
    assert [ticket.back is not None for ticket in tickets] == [False, True, False]
    assert torch.equal(parking.fetch(second, last=False), tensors[1])
    assert [ticket.back is not None for ticket in tickets] == [True, False, False]
    assert [ticket.host is not None for ticket in tickets] == [True, True, False]
    again = parking.fetch(second, last=True)
    assert torch.equal(again, tensors[1]) and torch.equal(parking.fetch(first, last=True), tensors[0])


def test_buffers_are_those_of_the_last_shape_and_dtype():
    parking, x = offload.Parking(), torch.randn(8, 4)
    for each in (x, x[:6], x[:6].bfloat16(), x):
        assert torch.equal(parking.fetch(parking.park(each), last=True), each)
        assert [(key, len(free)) for key, free in parking._free.items()] == [((each.shape, each.dtype), 1)]
