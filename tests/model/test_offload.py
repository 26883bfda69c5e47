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
