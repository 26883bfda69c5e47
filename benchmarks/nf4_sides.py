"""The kernel sides of bench_nf4, each in a process of its own: quantise and dequantise by minitune or bitsandbytes.

Apart, because bitsandbytes brings an OpenMP runtime of its own, and two in one process slow each other down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import serve

SHAPES = {"2048x2048": (2048, 2048), "5632x2048": (5632, 2048), "4096x11008": (4096, 11008)}


def timed(call: Callable[[], Any], n: int) -> list[float]:
    """Seconds of each of `n` calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(n):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return seconds


def ours(shape: str, double_quant: bool, n: int) -> dict[str, Any]:
    """Seconds of quantise, of dequantise into a reused buffer and into fresh memory, bf16; and of copying the 16-bit
    weight into that buffer, which is about what the machine's memory allows."""
    import torch

    from minitune.ops import backends, nf4

    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape]).bfloat16()
    packed, buffer = nf4.quantize(weight, double_quant), torch.empty_like(weight)
    return {"backend": backends.choose("nf4", weight.device), "quantize": timed(
        lambda: nf4.quantize(weight, double_quant), n), "dequantize": timed(
        lambda: packed.dequantize(out=buffer), n), "dequantize_fresh": timed(lambda: packed.dequantize(), n),
        "copy": timed(lambda: buffer.copy_(weight), n)}


def theirs(shape: str, double_quant: bool, n: int) -> dict[str, Any]:
    """The same by bitsandbytes, which always takes fresh memory."""
    import bitsandbytes.functional as bnb
    import torch

    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape]).bfloat16()
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
    return {"quantize": timed(lambda: bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4"),
                              n), "dequantize": timed(lambda: bnb.dequantize_4bit(packed, state), n)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "theirs"])
    told = parser.parse_args()
    serve(lambda: {"time": ours if told.side == "ours" else theirs})


if __name__ == "__main__":
    main()
