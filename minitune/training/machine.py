"""What a run measures of its machine: the rate of a large matrix product, the memory taken, whether it is alone."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

SIDES = {"cuda": 8192, "cpu": 1024}
"""Side of the measured product: large enough that the library runs at full rate."""
SECONDS = 0.2
"""The product is repeated for about so long."""
LOOK, CROWDED = 10.0, 0.2
"""Seconds between two looks at who else computes, and the share of them waited for a core from which it is said: alone
it is below 0.01; beside one other busy process, with two threads on two cores, about 0.33."""


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


class Company:
    """Watches for others on this process's cores: where one of its threads has to wait for a core, the others spin at
    the end of the parallel loop until it is done, and steps take several times as long. `told` says so, once."""

    def __init__(self, device: torch.device) -> None:
        alone = device.type != "cpu" or torch.get_num_threads() == 1
        self._waited = None if alone else _waited()
        self._since = time.perf_counter()

    def told(self) -> str | None:
        """What to tell the user, or None: all is well, it was told before, or the system does not count it."""
        seconds = time.perf_counter() - self._since
        if self._waited is None or seconds < LOOK:
            return None
        waited = _waited()
        share = 0.0 if waited is None else (waited - self._waited) / seconds
        self._waited, self._since = waited, self._since + seconds
        if share < CROWDED:
            return None
        self._waited, threads = None, torch.get_num_threads()   # once is enough
        return (f"for {share:.0%} of the last {seconds:.0f} seconds this process waited for a core, and where one of "
                f"its {threads} threads waits, all do: other processes compute here, or a container's share of the CPU "
                f"is used up; end them, or take fewer threads (OMP_NUM_THREADS={threads - 1})")


def _waited() -> float | None:
    """Seconds that the calling thread was ready to run and had no core, since it began; None where Linux does not
    tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None
