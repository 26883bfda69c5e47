"""The ways of the LoRA product on this CPU: separate products (addmm) and the augmented one, in turns; raw JSON out.

``python -m benchmarks.bench_lora``. The four products of a layer of each size of bench_train, 1,024 tokens, rank 16 on
every linear, bf16. What `minitune/ops/lora_matmul.py` takes on a CPU rests on it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.harness import VOID_SHARE, machine, other_share, read_ticks, save
from benchmarks.shapes import RANK, SIZES
from minitune.ops.tuning import product_times

TOKENS = 1024
PARTS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
"""Linears that share a product: their ranks add up."""


def main() -> None:
    rows: list[dict[str, Any]] = []
    before = read_ticks(os.getpid())
    for name in ("12x768", "16x2048"):
        for product, inner, outer in SIZES[name].products():
            found = product_times(outer, inner, RANK * PARTS[product], TOKENS, torch.bfloat16, torch.device("cpu"))
            for step in ("forward", "input"):
                ms = found[step]
                rows.append({"size": name, "product": product, "step": step, "ms": ms,
                             "augmented_over_addmm": ms["reference"] / ms["augmented"]})
                print(f"{name} {product} {step}: addmm {ms['reference']:.2f} ms, augmented {ms['augmented']:.2f} ms, "
                      f"{rows[-1]['augmented_over_addmm']:.3f} times as fast")
    others = other_share(before, read_ticks(os.getpid()))
    path = save("lora-products", {"kind": "lora products", "machine": machine(), "tokens": TOKENS, "rank": RANK,
                                  "others_share": others, "void": others > VOID_SHARE, "rows": rows})
    print(f"raw figures: {path.name}")


if __name__ == "__main__":
    main()
