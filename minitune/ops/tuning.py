"""tuning: times every way of the measured ops at a model's shapes, on the device at hand; `tuned` keeps the result."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from minitune.ops import attention, backends, lora_matmul, nf4, tuned
from minitune.ops.augmented import Augmented
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4
from minitune.ops.tuned import Shape, Table

Runs = dict[str, Callable[[], object]]
ROUNDS = 9
"""Each way runs so many times, in turns with the others; the median counts."""


def measure(products: dict[str, tuple[int, int, int]], heads: tuple[int, int, int], tokens: int, longest: int,
            dtype: torch.dtype, device: torch.device) -> Table:
    """products: name -> (N, K, summed rank) of each fused projection; heads: (heads, kv_heads, head_dim). `tokens` T
    of a micro-batch in documents of `longest` -> what `tuned` keeps."""
    found: Table = {}
    for n, k, rank in set(products.values()):
        for quantized in (False, True):
            for step, ms in product_times(n, k, rank, tokens, dtype, device, quantized).items():
                name = tuned.name_of(f"lora_matmul {step}", dtype, quantized)
                found.setdefault(name, {})[n, k, rank, tokens] = ms
    times = attention_times(heads, tokens, longest, dtype, device)
    found[tuned.name_of("attention", dtype)] = {(*heads, longest): times}
    return found


def product_times(n: int, k: int, rank: int, tokens: int, dtype: torch.dtype, device: torch.device,
                  quantized: bool = False) -> dict[str, dict[str, float]]:
    """step -> way -> milliseconds of a projection [N, K] with adapters of the summed rank. quantized: its weight lies
    in NF4; the adapters' gradients, which read no weight, are left out then."""
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    dense = random(n, k) * k**-0.5
    weight = FusedNF4([nf4.quantize(dense)], DecodeBuffer(dtype)) if quantized else dense
    around = Augmented(weight, rank, dtype)
    a, b = random(rank, k) * k**-0.5, random(n, rank)
    around.fill(a, b)
    w = LoraWeights(weight, None, a, b)
    margins = w._replace(weight=weight if isinstance(weight, FusedNF4) else around.weight, around=around)
    x, dy = random(tokens, k), random(tokens, n)
    s, ds = x @ a.mT, dy @ b
    with tuned.forced(lora_matmul_forward="augmented", lora_matmul_input="augmented"):
        rows, d_rows = lora_matmul.input_rows(tokens, margins), lora_matmul.gradient_rows(tokens, margins)
    assert rows is not None and d_rows is not None
    rows.copy_(x)
    d_rows.copy_(dy)
    forward = {"reference": lambda: lora_matmul.forward(x, w), "augmented": lambda: lora_matmul.forward(rows, margins),
               "triton": lambda: lora_matmul.forward(x, w)}
    back = {"reference": lambda: lora_matmul.backward_input(dy, ds, w),
            "augmented": lambda: lora_matmul.backward_input(d_rows, ds, margins),
            "triton": lambda: lora_matmul.backward_input(dy, ds, w)}
    adapters = {way: lambda: lora_matmul.backward_adapters(dy, x, s, ds, w) for way in ("reference", "triton")}
    steps: dict[str, Runs] = {"forward": {**forward}, "input": {**back}}
    if not quantized:
        steps["adapters"] = {**adapters}
    return {step: in_turns("lora_matmul", step, runs, device) for step, runs in steps.items()}


def attention_times(heads: tuple[int, int, int], tokens: int, longest: int, dtype: torch.dtype,
                    device: torch.device) -> dict[str, float]:
    """way -> milliseconds of forward and backward together, documents of length `longest`."""
    n_heads, kv_heads, head_dim = heads
    lengths = (longest,) * (tokens // longest) or (tokens,)
    documents = Documents.from_lengths(lengths, device)
    qkv = torch.randn(sum(lengths), n_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((n_heads, kv_heads, kv_heads), dim=1)
    gradient, dout = torch.empty_like(qkv), torch.randn_like(q)

    def run() -> None:
        attention.backward(dout, attention.forward(q, k, v, documents)[1], gradient)

    return in_turns("attention", "", {"reference": run, "triton": run}, device)


def in_turns(op: str, step: str, runs: Runs, device: torch.device) -> dict[str, float]:
    """way -> median milliseconds; a way that is not there, or does not run at this shape, is left out."""
    name = f"{op}_{step}" if step else op
    runs = {way: run for way, run in runs.items() if way not in backends.NAMES or not backends.missing(way, device)}
    samples: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(ROUNDS + 2):      # the first two compile and warm up
        for way, run in list(runs.items()):
            try:
                with tuned.forced(**{name: way}):
                    ms = _milliseconds(run, device)
            except getattr(torch, "AcceleratorError", ()):      # the device is lost: nothing more can be measured
                raise
            except Exception as error:      # of the compiler, of the library: whatever it is, this way is no choice
                warnings.warn(f"{op} {step}: {way} does not run here: {type(error).__name__}: {error}", stacklevel=2)
                del runs[way]
                continue
            if turn >= 2:
                samples[way].append(ms)
    return {way: statistics.median(samples[way]) for way in runs}


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)    # the launches of a short run are queued before its time begins
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def shapes(products: Table) -> list[tuple[str, Shape, str, dict[str, float]]]:
    """(op, shape, the fastest way, milliseconds of each) of everything that was measured, for showing."""
    return [(op, shape, min(ms, key=lambda way: ms[way]), ms) for op, found in products.items()
            for shape, ms in found.items() if ms]
