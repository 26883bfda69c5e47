"""sent: the values arrive, and a GPU's host waits for nothing."""

import pytest
import torch

from minitune.ops.transfer import sent


def test_the_values_arrive():
    value = torch.arange(5)
    assert torch.equal(sent(value, torch.device("cpu")), value)


@pytest.mark.gpu
def test_nothing_is_waited_for():
    value = torch.arange(5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sent(value, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), value)
