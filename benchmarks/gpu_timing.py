"""Timing of device work: median and spread in milliseconds, a cold L2 before every repeat, and the matrix rate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import summary
from minitune.training import machine

_CACHE_BYTES = 256 * 2**20
"""Written before each repeat; several times the L2 of any present GPU."""


def emit(**row: Any) -> None:
    """Print one row of figures as a line of JSON, at once, so that a later crash loses nothing."""
    print(json.dumps(row), flush=True)


def reason(error: BaseException) -> str:
    """The first line of an error, for a table."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def timed(run: Callable[[], object], device: str, warmup_ms: int = 25, repeat_ms: int = 120) -> dict[str, float]:
    """{"median", "p20", "p80"} milliseconds of `run` on `device`: by Triton's timer, else by CUDA events of our own."""
    if device != "cuda":
        return _host_timed(run)
    try:
        from triton.testing import do_bench
    except ImportError:
        return _event_timed(run, warmup_ms, repeat_ms)
    median, p20, p80 = do_bench(run, warmup=warmup_ms, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8])
    return {"median": median, "p20": p20, "p80": p80}


def _host_timed(run: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    run()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - begun))
    return summary(taken)


def _event_timed(run: Callable[[], object], warmup_ms: int, repeat_ms: int) -> dict[str, float]:
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    once_ms = max(200 * (time.perf_counter() - begun), 1e-3)
    for _ in range(max(1, int(warmup_ms / once_ms))):
        run()
    repeats = max(5, int(repeat_ms / once_ms))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        cache.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return summary([begin.elapsed_time(end) for begin, end in pairs])


def matrix_rate(device: str) -> float:
    """TFLOP/s in bf16, as a run's progress measures it: the ceiling that shares are given of."""
    return machine.matrix_rate(torch.device(device), torch.bfloat16) / 1e12


def copy_rate(device: str, n_bytes: int | None = None) -> float:
    """GB/s of copying `n_bytes` (1 GiB on a GPU) of bf16, bytes read and written: the ceiling of what only moves."""
    size = n_bytes or (1 << 30 if device == "cuda" else 1 << 20)
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device)["median"] / 1e6


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found - truth‖ / ‖truth‖ in the truth's precision; 1e30 where anything is not finite."""
    off = (found.to(truth.dtype) - truth).norm() / truth.norm()
    return float(off) if bool(off.isfinite()) else 1e30
