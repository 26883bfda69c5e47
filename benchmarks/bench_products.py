"""A product of the library on this CPU, whole and by parts of its rows on each thread, in turns; raw JSON out.

``python -m benchmarks.bench_products``. bf16; the right operand a weight's transpose, as in a forward pass, and as it
lies, as in a backward. What `minitune/ops/products.py` takes by parts rests on it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import VOID_SHARE, machine, other_share, read_ticks, save
from minitune.ops import backends

ROWS = (192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Of one thread."""
COLUMNS = (256, 512, 768, 1024, 1152, 1280, 1536, 2048)
DEPTHS = (576, 768, 2112, 4160)
ROUNDS, SECONDS = 5, 0.03


def main() -> None:
    reason = backends.missing("native", torch.device("cpu"))
    if reason:
        raise SystemExit(f"bench_products: {reason}")
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    before = read_ticks(os.getpid())
    for n in COLUMNS:
        for k in DEPTHS:
            for of_thread in ROWS:
                for transposed in (True, False):
                    whole, apart = _times(of_thread * threads, n, k, transposed)
                    rows.append({"rows": of_thread * threads, "columns": n, "depth": k, "transposed": transposed,
                                 "whole_ms": whole * 1e3, "apart_ms": apart * 1e3, "apart_over_whole": whole / apart})
            gains = [row["apart_over_whole"] for row in rows[-2 * len(ROWS):]]
            print(f"{n} columns, depth {k}: by parts {min(gains):.2f} to {max(gains):.2f} times as fast", flush=True)
    others = other_share(before, read_ticks(os.getpid()))
    path = save("products", {"kind": "products", "machine": machine(), "threads": threads, "others_share": others,
                             "void": others > VOID_SHARE, "rows": rows})
    print(f"raw figures: {path.name}")


def _times(rows: int, columns: int, depth: int, transposed: bool) -> tuple[float, float]:
    """Seconds of the product whole and by parts: medians of rounds by turns."""
    x = torch.randn(rows, depth).bfloat16()
    right = torch.randn(columns, depth).bfloat16().mT if transposed else torch.randn(depth, columns).bfloat16()
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    ways: tuple[Callable[[], object], ...] = (lambda: torch.mm(x, right, out=out),
                                              lambda: torch.ops.minitune.product_apart(x, right, out))
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(ROUNDS):
        for way, found in zip(ways, seconds, strict=True):
            way()
            begun, n = time.perf_counter(), 0
            while n < 3 or time.perf_counter() - begun < SECONDS:
                way()
                n += 1
            found.append((time.perf_counter() - begun) / n)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
