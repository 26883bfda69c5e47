"""attention: what its kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import ARCHES, Row
from minitune.kernels import attention
from minitune.kernels.launch import Config

KERNELS = {
    "forward": (attention.attention_forward, ("q", "k", "v", "out"), ("starts",), ("lse",)),
    "dq": (attention.attention_dq, ("dout", "q", "k", "v", "out", "dq"), ("starts",),
           ("lse", "minus_lse", "minus_delta")),
    "dkdv": (attention.attention_dkdv, ("dout", "q", "k", "v", "dk", "dv"), ("ends",), ("minus_lse", "minus_delta")),
}
"""kernel, its tensors [T, heads, D], int32 [T], fp32 [heads, T]"""


def _sizes(names: tuple[str, ...], heads: int, kv_heads: int, d: int) -> dict[str, Any]:
    """q, k and v are views of one buffer, and so are dq, dk and dv; out and dout are tensors of their own."""
    sizes: dict[str, Any] = {"GROUP": heads // kv_heads, "D": d, "BLOCK_D": 1 << (d - 1).bit_length(),
                             "SCALE": d ** -0.5}
    for name in names:
        rows = heads if "out" in name else heads + 2 * kv_heads
        sizes |= {f"{name.upper()}_ROW": rows * d, f"{name.upper()}_HEAD": d}
    return sizes


def row(kernel: str, dtype: str, heads: int, kv_heads: int, d: int, config: Config, arches: tuple[int, ...]) -> Row:
    function, names, bounds, statistics = KERNELS[kernel]
    signature = dict.fromkeys(names, f"*{dtype}:16") | dict.fromkeys(bounds, "*i32:16")
    signature |= dict.fromkeys(statistics, "*fp32:16") | dict.fromkeys(("tokens", "window"), "i32")
    # Tiles of fewer than 64 rows, all that head 256 leaves registers for, are multiplied the older way on sm_90.
    narrow = 90 in arches and config.tiles["BLOCK_N" if kernel == "dkdv" else "BLOCK_M"] < 64
    return Row(f"attention_{kernel} {dtype} {heads}/{kv_heads}x{d}", function, signature,
               {**_sizes(names, heads, kv_heads, d), **config.tiles}, config.options(), config.registers,
               shared=config.shared, arches=arches, matrix=dtype != "fp32" and not narrow)


def _rows(size: str, heads: int, kv_heads: int, d: int, dtype: str = "bf16",
          arches: tuple[int, ...] = ARCHES) -> list[Row]:
    """For each kernel one for each configuration of this size, on the generations that it serves."""
    rows = []
    for kernel in KERNELS:
        serves: dict[int, tuple[int, ...]] = {}
        configs = attention.CONFIGS[f"{kernel} {size}"]
        for arch in arches:
            own = max(known for known in configs if known <= arch)
            serves[own] = (*serves.get(own, ()), arch)
        rows += [row(kernel, dtype, heads, kv_heads, d, configs[own], served) for own, served in serves.items()]
    return rows


ROWS = [
    *_rows("64", 14, 2, 64),        # Qwen2-0.5B
    *_rows("128", 32, 8, 128),      # Llama-3-8B
    *_rows("128", 32, 32, 80, arches=(90,)),
    *_rows("256", 8, 4, 256),       # Gemma-2-2B
    *_rows("fp32", 4, 2, 128, dtype="fp32", arches=(80,)),
]
