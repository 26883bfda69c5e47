"""What a run measures of its machine: the rate of a large matrix product, and the memory taken so far."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import sys
import time

import torch

SIDES = {"cuda": 8192, "cpu": 1024}
"""Side of the measured product: large enough that the library runs at full rate."""
SECONDS = 0.2
"""The product is repeated for about so long."""


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices on `device`: the ceiling that a step's share is given of.

    The median of repeats in about 0.2 s; measured once a process. Draws nothing from torch's own generators.
    """
    side = SIDES.get(device.type, SIDES["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(2):      # the first one finds the kernel
        torch.mm(left, right, out=out)
    taken: list[float] = []
    while sum(taken) < SECONDS or len(taken) < 3:
        taken.append(_seconds(left, right, out))
    return 2 * side**3 / statistics.median(taken)


def _seconds(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    if left.device.type != "cuda":
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(left.device)
    begin.record(stream)
    torch.mm(left, right, out=out)
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU since the process began, else the process's largest resident
    size; 0 where the system does not tell. The device is not asked."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:        # not on Windows
        return 0
    resource = importlib.import_module("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
