"""memory: huge pages are asked for under large tensors alone, and lie there where Linux grants them."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from minitune.model.memory import HUGE_PAGE, ask_for_huge_pages

GRANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that hold the tensor, as /proc/self/smaps counts them."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(side, 16) for side in bounds.groups())
            inside = begin < tensor.data_ptr() + tensor.nbytes and end > tensor.data_ptr()
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not GRANTED.exists() or "[madvise]" not in GRANTED.read_text(),
                    reason="Linux gives huge pages to all, or to nobody, here")
def test_large_tensors_lie_in_huge_pages():
    fresh = mmap.mmap(-1, 8 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)      # what nobody wrote to yet
    asked = torch.frombuffer(fresh, dtype=torch.uint8)
    ask_for_huge_pages([asked])
    asked.fill_(1)
    assert _huge_bytes(asked) >= 4 * HUGE_PAGE
    assert bool((asked == 1).all())


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch):
    kept = torch.arange(1000)
    ask_for_huge_pages([kept, torch.empty(0), torch.empty(8 * HUGE_PAGE, dtype=torch.uint8, device="meta")])
    assert torch.equal(kept, torch.arange(1000))
    monkeypatch.setattr(sys, "platform", "win32")
    ask_for_huge_pages([torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)])
