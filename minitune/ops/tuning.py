"""tuning: times every way of the measured ops at a model's shapes, on the device at hand; `tuned` keeps the result."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from minitune.ops import attention, backends, lora_matmul, nf4, rms_norm, rope, tuned
from minitune.ops.augmented import Augmented
from minitune.ops.deterministic import deterministic
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4
from minitune.ops.tuned import Shape, Table

Results = Tensor | tuple[Tensor | None, ...]
Runs = dict[str, Callable[[], Results]]
ROUNDS = 9
"""Each way runs so many times, in turns with the others; the median counts."""
AGREE = 0.02
"""How far a way may be from the first one, norm of the difference over norm: rounding in 16 bits stays well below it,
another unit of the log-sum-exp or a part left unwritten does not. Finer faults are for `minitune doctor`."""
UNMEASURED = ("flash", "documents", "blocks", "native")
"""Ways of attention that are called "reference" in the table: what is taken where nothing is measured."""


def measure(products: dict[str, tuple[int, int, int]], normed: Collection[str], heads: tuple[int, int, int],
            tokens: int, longest: int, dtype: torch.dtype, device: torch.device) -> Table:
    """products: name -> (N, K, summed rank) of each fused projection, `normed` those whose input a norm gives; heads:
    (heads, kv_heads, head_dim). `tokens` T of a micro-batch in documents of `longest` -> what `tuned` keeps."""
    found: Table = {}
    for n, k, rank in set(products.values()):
        for quantized in (False, True):
            for step, ms in product_times(n, k, rank, tokens, dtype, device, quantized).items():
                name = tuned.name_of(f"lora_matmul {step}", dtype, quantized)
                found.setdefault(name, {})[n, k, rank, tokens] = ms
    norms = {(products[name][1], products[name][2], tokens) for name in normed}
    found[tuned.name_of("rms_norm s", dtype)] = {shape: norm_times(*shape, dtype, device) for shape in norms}
    return found | attention_table(heads, tokens, longest, dtype, device)


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


def norm_times(d: int, rank: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """way -> milliseconds of a norm with the sum before it and the thin product behind it."""
    x, branch = (torch.randn(tokens, d, dtype=dtype, device=device) for _ in range(2))
    weight, a = torch.rand(d, device=device).to(dtype), torch.randn(rank, d, dtype=dtype, device=device) * d**-0.5

    def run(way: str) -> Results:
        y, _, total, s = rms_norm.forward_s(x, weight, 1e-5, branch, a)
        _check_taken(way, "reference" if s is None else "triton")
        return y, total, y @ a.mT if s is None else s

    return in_turns("rms_norm", "s", _each(("reference", "triton"), run), device)


def attention_table(heads: tuple[int, int, int], tokens: int, longest: int, dtype: torch.dtype,
                    device: torch.device) -> Table:
    """What `tuned` keeps of attention's forward and backward, documents of length `longest`."""
    n_heads, kv_heads, head_dim = heads
    lengths = (longest,) * (tokens // longest) or (tokens,)
    documents = Documents.from_lengths(lengths, device)
    qkv = torch.randn(sum(lengths), n_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((n_heads, kv_heads, kv_heads), dim=1)
    dout = torch.randn_like(q)
    angle = torch.rand(len(q), head_dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    with tuned.forced(attention_forward="reference"):
        saved = attention.forward(q, k, v, documents)[1]

    def forward(way: str) -> Tensor:
        taken = attention.forward_way(q, k, documents, None)
        _check_taken(way, "reference" if taken in UNMEASURED else taken)
        return attention.forward(q, k, v, documents)[0]

    def backward(way: str) -> Tensor:       # and back through the rotation, into one buffer: as the layer wants it
        apart = attention.backward_apart(dout, saved, keep_graph=True)
        gradient = torch.empty_like(qkv)
        if apart is not None:
            _check_taken(way, "reference")
            rope.join(*apart, cos, sin, gradient, back=True)
        else:
            taken = attention.backward_way(q, k, longest, None) if saved.lse is not None else "blocks"
            _check_taken(way, "reference" if taken in UNMEASURED else taken)
            attention.backward(dout, saved, gradient, keep_graph=True)
            rope.rotate_(gradient[:, : n_heads + kv_heads], cos, sin, back=True)
        return gradient

    steps = {"forward": _each(("reference", "triton", "cudnn"), forward),
             "backward": _each(("reference", "triton"), backward)}
    return {tuned.name_of(f"attention {step}", dtype): {(*heads, longest): in_turns("attention", step, runs, device)}
            for step, runs in steps.items()}


def _each(ways: tuple[str, ...], run: Callable[[str], Results]) -> Runs:
    return {way: functools.partial(run, way) for way in ways}


class _NotTaken(Exception):
    """The way that is asked for is none at this shape; another one would be timed under its name."""


def _check_taken(way: str, taken: str) -> None:
    if taken != way:
        raise _NotTaken


def in_turns(op: str, step: str, runs: Runs, device: torch.device) -> dict[str, float]:
    """way -> median milliseconds; a way that is not there, does not run at this shape, or gives another result than the
    first one, is left out."""
    runs = {way: run for way, run in runs.items() if way not in backends.NAMES or not backends.missing(way, device)}
    samples: dict[str, list[float]] = {way: [] for way in runs}
    expected: list[Tensor] = []
    for turn in range(ROUNDS + 2):      # the first two compile and warm up
        for way, run in list(runs.items()):
            try:
                with tuned.forced(**{f"{op}_{step}": way}):
                    if turn == 0:
                        with _poisoned():
                            results = run()
                        _compare(results, expected)
                        del results
                    ms = _milliseconds(run, device)
            except _NotTaken:
                del runs[way]
                continue
            except getattr(torch, "AcceleratorError", ()):      # the device is lost: nothing more can be measured
                raise
            except Exception as error:      # of the compiler, of the library: whatever it is, this way is no choice
                warnings.warn(f"{op} {step}: {way} is left out: {type(error).__name__}: {error}", stacklevel=2)
                del runs[way]
                continue
            if turn >= 2:
                samples[way].append(ms)
    return {way: statistics.median(samples[way]) for way in runs}


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Within it new memory holds NaN: what a way leaves unwritten is no right result of the way before.

    torch fills it in its deterministic mode, which only warns here, and nobody needs to hear it.
    """
    with deterministic(warn_only=True, fill=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compare(results: Results, expected: list[Tensor]) -> None:
    """Keep the first way's results in `expected`; ValueError where another's differ from them."""
    values = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    if not expected:
        expected += [value.clone() for value in values]
        return
    for value, right in zip(values, expected, strict=True):
        off = float(torch.linalg.vector_norm(value - right, dtype=torch.float32)
                    / torch.linalg.vector_norm(right, dtype=torch.float32))
        if not off <= AGREE:
            raise ValueError(f"its result is {off:.3g} off the first way's, relative to that")


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
