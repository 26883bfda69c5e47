"""NF4 on a GPU: decode and encode rates beside a plain copy, quantising while loading, a QLoRA step of Llama-2-7B.

``python -m benchmarks.gpu_nf4 --device cuda`` prints a row of JSON a figure. Each backend's bits are held to those of
the CPU, then it is timed. Rates count the bytes that must be read and written at the least, so the share of the copy
rate says how near it is to the limit of the memory. A load's rate stands beside that of plainly reading the same file.
"right" says that a figure may be believed, "promise" that it is as good as we said it would be.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import minitune as mt
from benchmarks.gpu_step import flops_a_token, train, write_folder
from benchmarks.gpu_timing import copy_rate, emit, matrix_rate, reason, timed
from benchmarks.harness import summary
from benchmarks.random_weights import ours
from benchmarks.shapes import SEED, SEVEN_B, TINY, Size
from benchmarks.tables_nf4 import (
    GPU_LOAD_GB_PER_S,
    GPU_LOAD_OF_DISK,
    GPU_STEP_8BIT_GB,
    GPU_STEP_GB,
    GPU_STEP_OFFLOAD_GB,
)
from minitune.ops import backends, nf4
from minitune.ops.nf4 import NF4Weight
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4

PAD = 64
"""Columns between two rows of the pitched buffer: where an adapter's rank would stand beside the weight."""
SLACK = 64 << 20
"""Bytes of a load beside its result and one tensor: absmax in fp32 and fp64 on its way to 8 bits."""
LOADS, LOAD_SECONDS = 3, 15
"""Loads with nothing in the page cache; none is begun after so many seconds of the first."""
Shapes = dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Plan:
    """How large everything is. A weight of several parts is decoded into one buffer whose rows lie apart."""

    weights: Shapes
    loaded: Size
    trained: Size
    length: int
    warmup: int
    steps: int


PLANS = {
    "cuda": Plan({"4096x4096": ((4096, 4096),), "11008x4096": ((11008, 4096),), "4096x11008": ((4096, 11008),),
                  "gate and up, 2 x 11008x4096": ((11008, 4096),) * 2},
                 replace(SEVEN_B, layers=8), SEVEN_B, 2048, 2, 5),
    "cpu": Plan({"64x64": ((64, 64),), "48x40": ((48, 40),), "gate and up, 2 x 33x64": ((33, 64),) * 2},
                TINY, TINY, 32, 2, 3)}


class Training(NamedTuple):
    """A QLoRA step: memory policy, AdamW's moments, and the GB of a GPU that were promised for it at the most."""

    memory: str
    moments: str
    most_gb: float | None = None


TRAININGS = (Training("full", "fp32", GPU_STEP_GB), Training("full", "8bit", GPU_STEP_8BIT_GB),
             Training("offload", "8bit", GPU_STEP_OFFLOAD_GB))


# ---- rows -----------------------------------------------------------------------------------------------------------
def attempt(row: dict[str, Any], work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Print `row` with what `work` found, or with its error: whatever that is, the next rows still count."""
    try:
        found = work(*arguments)
    except Exception as failure:
        found = {"error": reason(failure), "right": False}
    emit(**row, **found)


def speed(run: Callable[[], object], n_bytes: int, device: str, rate: float) -> dict[str, Any]:
    """Milliseconds, GB/s of `n_bytes` and their share of the copy rate."""
    ms = timed(run, device)
    gb_per_s = n_bytes / ms["median"] / 1e6
    return {"ms": ms, "gb_per_s": gb_per_s, "share_of_copy": gb_per_s / rate}


def free(device: str) -> None:
    """Give unused memory back, so that one measurement does not weigh on the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# ---- kernels --------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """Weights with their 4-bit form and its values, both made on the CPU: what every other side is held to."""

    weights: list[Tensor]
    stored: list[NF4Weight]
    values: Tensor
    double_quant: bool

    @property
    def moved_bytes(self) -> int:
        """What a decode to bf16 reads and writes, and an encode writes and reads."""
        return sum(part.nbytes for part in self.stored) + 2 * self.values.numel()


def make(shapes: tuple[tuple[int, int], ...], double_quant: bool) -> Case:
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes]
    stored = [nf4.quantize(weight, double_quant) for weight in weights]
    return Case(weights, stored, torch.cat([part.dequantize() for part in stored]), double_quant)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.int16), expected.to(found.device).view(torch.int16))


def absent(backend: str, device: str) -> dict[str, Any]:
    """What stands for figures of a backend that is not there. On a GPU that is wrong of the extension, which the first
    part of `make gpu` builds."""
    why = backends.missing(backend, torch.device(device))
    wrong = backend == "native" and device == "cuda"
    return {"unavailable": why, **({"right": False} if wrong else {})} if why else {}


def decode(case: Case, backend: str, device: str, rate: float) -> dict[str, Any]:
    """Into a reused buffer, poisoned before the check; what lies between its rows must stay as it was."""
    lacking = absent(backend, device)
    if lacking:
        return lacking
    rows, columns = case.values.shape
    pad = PAD if len(case.stored) > 1 else 0
    fused = FusedNF4([part.to(device) for part in case.stored], DecodeBuffer(torch.bfloat16))
    room = torch.full((rows, columns + pad), float("nan"), dtype=torch.bfloat16, device=device)
    target = room[:, :columns]
    with backends.use(backend):
        fused.decode(target)
        if not same_bits(target, case.values) or not bool(room[:, columns:].isnan().all()):
            return {"right": False}
        if pad and backend == "reference" and device == "cuda":
            return {"right": True, "untimed": "checked only: a row at a time, in Python"}
        return {"right": True, **speed(lambda: fused.decode(target), case.moved_bytes, device, rate)}


def encode(case: Case, backend: str, device: str, rate: float) -> dict[str, Any]:
    """With its check for values that are not finite, which waits for the device."""
    lacking = absent(backend, device)
    if lacking:
        return lacking
    weight = case.weights[0].to(device)
    with backends.use(backend):
        found = nf4.quantize(weight, case.double_quant)
        if not all(torch.equal(found.tensors()[name].cpu(), value) for name, value in case.stored[0].tensors().items()):
            return {"right": False}
        return {"right": True, **speed(lambda: nf4.quantize(weight, case.double_quant), case.moved_bytes, device, rate)}


def rival(case: Case, what: str, device: str, rate: float) -> dict[str, Any]:
    """The same by bitsandbytes on a state of its own, into a contiguous buffer: it knows no row pitch. Whether its bits
    are ours is told, not asked for; a machine where it does not run is no failure of ours."""
    if device != "cuda":
        return {"unavailable": "measured on a GPU only"}
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"unavailable": "bitsandbytes is not installed on this machine"}
    try:
        bnb: Any = importlib.import_module("bitsandbytes.functional")
        weights = [weight.to(device) for weight in case.weights]
        states = [bnb.quantize_4bit(w, compress_statistics=case.double_quant, quant_type="nf4") for w in weights]
        if what == "quantise":
            same = torch.equal(states[0][0].cpu().view(-1), case.stored[0].packed)
            return {"same_bits": same, **speed(lambda: bnb.quantize_4bit(
                weights[0], compress_statistics=case.double_quant, quant_type="nf4"), case.moved_bytes, device, rate)}
        room = torch.empty(case.values.shape, dtype=torch.bfloat16, device=device)
        targets = room.split([len(weight) for weight in weights])

        def run() -> None:
            for (packed, state), target in zip(states, targets, strict=True):
                bnb.dequantize_4bit(packed, state, out=target)

        run()
        return {"same_bits": same_bits(room, case.values), **speed(run, case.moved_bytes, device, rate)}
    except Exception as failure:
        return {"unavailable": reason(failure)}


def kernels(weights: Shapes, device: str, rate: float) -> None:
    """Decode every weight, encode those of one part, in both kinds, by every side."""
    # All cases first: bitsandbytes brings an OpenMP runtime of its own, which would slow the CPU's part down.
    cases = {(name, kind): make(shapes, kind == "nf4-dq") for name, shapes in weights.items()
             for kind in ("nf4", "nf4-dq")}
    for (name, kind), case in cases.items():
        for what, check in (("dequantise", decode), ("quantise", encode))[: 2 if len(case.weights) == 1 else 1]:
            row = {"what": what, "weight": name, "kind": kind}
            for backend in (*backends.OPS["nf4"], "reference"):
                attempt({**row, "backend": backend}, check, case, backend, device, rate)
            attempt({**row, "backend": "bitsandbytes"}, rival, case, what, device, rate)
        free(device)


# ---- loading --------------------------------------------------------------------------------------------------------
def load(size: Size, device: str) -> dict[str, Any]:
    """Quantise a bf16 checkpoint while it is read, first its file in the page cache, then not. Right: a linear has the
    bits that the CPU gives it, and a GPU never held more than the result, one tensor and SLACK."""
    found: dict[str, Any] = {"backend": backends.choose("nf4", torch.device(device))}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(size, folder, device)
        file = folder / "model.safetensors"
        stored_bytes = file.stat().st_size
        first_s = load_once(folder, device)[1]      # compiles, and takes memory for the first time
        warm_s = load_once(folder, device)[1]
        model: Any = None
        peak, begun = 0, time.perf_counter()
        seconds: list[float] = []
        disk: list[float] = []
        while len(seconds) < LOADS and (not seconds or time.perf_counter() - begun < LOAD_SECONDS):
            model = None
            forget(file)
            disk.append(stored_bytes / read_plainly(file) / 1e9)
            forget(file)
            model, taken, peak = load_once(folder, device)
            seconds.append(taken)
        load_s, disk_rate = summary(seconds), summary(disk)
        rate = stored_bytes / load_s["median"] / 1e9
        found |= {"load_s": load_s, "first_s": first_s, "checkpoint_bytes": stored_bytes, "gb_per_s": rate,
                  "disk_gb_per_s": disk_rate, "warm_gb_per_s": stored_bytes / warm_s / 1e9,
                  "promise": rate >= min(GPU_LOAD_GB_PER_S, GPU_LOAD_OF_DISK * disk_rate["median"])}
        right = bits_of_a_linear(model, folder)
    if device == "cuda":
        result = sum(tensor.numel() * tensor.element_size() for tensor in model.network.hf_weights().values())
        result += sum(part.nbytes for p in model.network.projections() for part in p.fused.parts)
        largest = 2 * max(rows * columns for rows, columns in model.network.nf4_shapes().values())
        found |= {"peak_bytes": peak, "result_bytes": result, "largest_bytes": largest}
        right = right and peak <= result + largest + SLACK
    return {**found, "right": right}


def load_once(folder: Path, device: str) -> tuple[Any, float, int]:
    """(model, seconds, peak bytes of the device beside what it held)."""
    free(device)
    before = begin_peak(device)
    begun = time.perf_counter()
    model = mt.load(folder, device=device, dtype=torch.bfloat16, quant="nf4-dq")
    if device == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - begun
    return model, taken, torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def forget(file: Path) -> None:
    """Take a file out of the page cache, as far as the system lets us: a folder in memory stays where it is, and then
    the plain reading beside it is as fast as memory too."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)                    # what is not written yet cannot be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_plainly(file: Path) -> float:
    """Seconds of reading a file into one small buffer: the disk's rate, as a program gets it."""
    room = memoryview(bytearray(16 << 20))
    begun = time.perf_counter()
    with open(file, "rb", buffering=0) as source:
        while source.readinto(room):
            pass
    return time.perf_counter() - begun


def begin_peak(device: str) -> int:
    """Forget the device's peak memory; what is taken now."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def bits_of_a_linear(model: Any, folder: Path) -> bool:
    """Whether the last layer's o_proj lies in `model` as the CPU quantises it from the file."""
    from safetensors import safe_open

    name = f"model.layers.{model.config.n_layers - 1}.self_attn.o_proj.weight"
    with safe_open(folder / "model.safetensors", "pt") as file:
        expected = nf4.quantize(file.get_tensor(name)).tensors()
    found = model.network.blocks()[-1].attention.o.fused.parts[0].tensors()
    return all(torch.equal(found[key].cpu(), value) for key, value in expected.items())


# ---- training -------------------------------------------------------------------------------------------------------
def qlora(plan: Plan, case: Training, device: str, rate: float) -> dict[str, Any]:
    """Steps on one sequence, with their share of the matrix rate."""
    lengths = (plan.length,)
    model = ours(plan.trained, device, "nf4-dq", case.memory)
    found = train(model, plan.trained, lengths, device, plan.warmup, plan.steps, case.moments)
    flops = flops_a_token(plan.trained, lengths)
    if case.most_gb and "peak_bytes" in found:
        found |= {"most_gb": case.most_gb, "promise": found["peak_bytes"] <= case.most_gb * 1e9}
    return {**found, "flops_a_token": flops,
            "share_of_rate": found["tokens_per_s"]["median"] * flops / rate / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    plan = PLANS[device]
    torch.manual_seed(SEED)
    copied, multiplied = copy_rate(device), matrix_rate(device)
    emit(what="copy rate", gb_per_s=copied)
    emit(what="matrix rate", tflops=multiplied)
    free(device)
    attempt({"what": "load", "layers": plan.loaded.layers, "of_layers": plan.trained.layers}, load, plan.loaded, device)
    free(device)
    for case in TRAININGS:
        name = f"QLoRA, 1 x {plan.length}, memory {case.memory}, moments {case.moments}"
        attempt({"what": "step", "case": name, "layers": plan.trained.layers, "tokens": plan.length,
                 "memory": case.memory, "moments": case.moments}, qlora, plan, case, device, multiplied)
        free(device)
    kernels(plan.weights, device, copied)
    emit(what="end")


if __name__ == "__main__":
    main()
