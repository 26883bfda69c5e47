"""Bytes that a training step holds on a GPU, counted where none is: `python -m benchmarks.fake_gpu.memory`.

The step is run on `device.fake_gpu`, whose tensors have no values; what it allocates is what it would allocate.
Counted, not measured: cuBLAS's workspaces and the CUDA context come on top, and what the allocator cannot use of its
blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fake_gpu import device
from benchmarks.shapes import SEVEN_B, Size


@dataclass(frozen=True)
class Case:
    """A step with LoRA r 16 on all linears, or with what `train` names of the base: the model, how its weights lie,
    document lengths, policy, moments."""

    model: str
    quant: str | None
    lengths: tuple[int, ...]
    memory: str
    moments: str
    train: str | None = None


SIZES = {"Llama-2-7B": SEVEN_B,
         "Llama-3-8B": Size(layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8, head_dim=128, vocab=128_256),
         "Llama-3.2-1B": Size(layers=16, d_model=2048, d_ff=8192, heads=32, kv_heads=8, vocab=128_256, tied=True),
         "Llama-3.2-3B": Size(layers=28, d_model=3072, d_ff=8192, heads=24, kv_heads=8, head_dim=128, vocab=128_256,
                              tied=True)}
CASES = (
    Case("Llama-2-7B", None, (2048,) * 8, "keep", "fp32"), Case("Llama-2-7B", None, (2048,) * 8, "pointwise", "fp32"),
    Case("Llama-2-7B", None, (2048,) * 8, "full", "fp32"),
    Case("Llama-2-7B", None, (2048,), "keep", "fp32"), Case("Llama-2-7B", None, (2048,), "full", "fp32"),
    Case("Llama-2-7B", "nf4-dq", (2048,) * 8, "keep", "fp32"),
    Case("Llama-2-7B", "nf4-dq", (2048,) * 8, "full", "fp32"), Case("Llama-2-7B", "nf4-dq", (2048,), "full", "fp32"),
    Case("Llama-2-7B", "nf4-dq", (2048,), "full", "8bit"), Case("Llama-2-7B", "nf4-dq", (2048,), "offload", "8bit"),
    Case("Llama-3-8B", None, (2048,), "full", "fp32"),
    Case("Llama-3-8B", "nf4-dq", (2048,), "full", "8bit"), Case("Llama-3-8B", "nf4-dq", (8192,), "full", "8bit"),
    Case("Llama-3-8B", "nf4-dq", (8192,), "offload", "8bit"),
    *(Case(model, None, (2048,) * 4, memory, moments, "full") for model in ("Llama-3.2-1B", "Llama-3.2-3B")
      for memory, moments in (("keep", "fp32"), ("keep", "8bit"), ("full", "8bit"))))


def count(case: Case) -> dict[str, Any]:
    """Peak bytes of the second of two steps (the first makes the moments), those that stay between steps, and what the
    host waited for."""
    from unittest import mock

    import minitune as mt
    from benchmarks import random_weights
    from minitune.ops import nf4

    size = SIZES[case.model]
    batch = random_weights.batch(size, case.lengths, "cpu")
    with (device.fake_gpu() as watch, mock.patch.object(random_weights, "values", _values),
          mock.patch.object(nf4, "quantize", _quantized)):
        model = random_weights.ours(size, "cuda", case.quant, case.memory, case.train)
        model.train()
        optimizer = mt.AdamW(list(model.trainable_parameters()), moments=case.moments)
        given = batch.to("cuda")
        for _ in range(2):
            watch.restart()
            loss = model.loss(given)
            loss.backward()
            optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"peak_bytes": watch.peak, "between_bytes": watch.live, "waits": dict(watch.waits),
                "launches": sum(watch.launches.values()),
                "largest": [{"op": op, "bytes": size, "count": n} for (op, size), n in watch.most(8)]}


def _values(_: str, shape: tuple[int, ...], place: Any, dtype: Any) -> Any:
    import torch

    return torch.empty(shape, dtype=dtype, device=place)


def _quantized(weight: Any, double_quant: bool) -> Any:
    """The tensors that `nf4.quantize` gives for a matrix; the 256 levels are one tensor for all."""
    import torch

    from minitune.ops import nf4

    assert double_quant
    n_blocks = weight.numel() // nf4.BLOCKSIZE

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=weight.device)

    return nf4.NF4Weight(empty(weight.numel() // 2, dtype=torch.uint8), empty(n_blocks, dtype=torch.uint8),
                         empty(-(-n_blocks // nf4.NESTED_BLOCKSIZE)), nf4.nested_code(weight.device), empty(),
                         nf4.BLOCKSIZE, tuple(weight.shape), weight.dtype)


def rows() -> Iterator[dict[str, Any]]:
    """Every case with what was counted."""
    for case in CASES:
        yield {"model": case.model, "quant": case.quant, "lengths": list(case.lengths), "memory": case.memory,
               "moments": case.moments, "train": case.train, **count(case)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the raw file, default benchmarks/results")
    told = parser.parse_args()
    why = device.missing()
    if why:
        parser.error(why)
    with tempfile.TemporaryDirectory() as folder:
        device.load(device.build(Path(folder)))
    from benchmarks.harness import save

    found = []
    for row in rows():
        print(f"{row['model']} {row['train'] or 'LoRA'} {row['quant'] or 'bf16'}, {len(row['lengths'])} x "
              f"{row['lengths'][0]}, {row['memory']}, moments {row['moments']}: {row['peak_bytes'] / 1e9:.2f} GB",
              flush=True)
        found.append(row)
    print(f"raw figures: {save('memory', {'kind': 'memory', 'device': 'none', 'rows': found}, told.out).name}")
    device.leave()


if __name__ == "__main__":
    main()
