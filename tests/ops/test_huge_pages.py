"""huge_pages: asked for under large tensors of a CPU alone, and there where Linux grants them."""

import ctypes
import mmap
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import minitune as mt
from minitune.checkpoint import reader
from minitune.ops import huge_pages
from minitune.ops.huge_pages import LEAST
from tests.files import write_tiny

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
    fresh = mmap.mmap(-1, 8 * LEAST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)      # what nobody wrote to yet
    asked = torch.frombuffer(fresh, dtype=torch.uint8)
    huge_pages.ask([asked])
    asked.fill_(1)
    assert _huge_bytes(asked) >= 4 * LEAST
    assert bool((asked == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="asked for on Linux alone")
def test_large_tensors_of_a_cpu_alone_are_asked_for(monkeypatch):
    library = mock.Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    large, small = torch.empty(LEAST, dtype=torch.uint8), torch.empty(LEAST - 1, dtype=torch.uint8)
    huge_pages.ask([small, torch.empty(0), torch.empty(8 * LEAST, dtype=torch.uint8, device="meta"), large])
    (begin, n_bytes, advice), = [call.args for call in library.madvise.call_args_list]
    assert advice == mmap.MADV_HUGEPAGE
    assert begin <= large.data_ptr() < begin + mmap.PAGESIZE and begin % mmap.PAGESIZE == 0
    assert begin + n_bytes == large.data_ptr() + large.nbytes
    monkeypatch.setattr(sys, "platform", "win32")
    huge_pages.ask([large])
    assert library.madvise.call_count == 1


def test_a_model_asks_for_its_weights_and_for_those_that_are_laid_out_anew(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "ask", lambda tensors: asked.extend(tensor.data_ptr() for tensor in tensors))
    monkeypatch.setattr(reader, "map_bytes", lambda *where: None)      # else some stay where their file is mapped
    model = mt.load(write_tiny(tmp_path), device="cpu", dtype="bfloat16", lora=mt.LoRA(rank=2))
    weights = [projection.weight for projection in model.network.projections()]
    assert {model.network.embedding.data_ptr(), *(weight.data_ptr() for weight in weights)} <= set(asked)
