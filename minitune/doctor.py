"""doctor and tune: what this machine can do, whether every op is right on it, and which way of an op is the fastest."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

from minitune.checkpoint.hf_config import read_config
from minitune.config import LoRA, ModelConfig, check_whole, short
from minitune.devices import choose_device, choose_dtype
from minitune.errors import InputError
from minitune.model.llama import Llama
from minitune.model.memory import free_bytes
from minitune.model.shapes import shape
from minitune.ops import checks, tuned, tuning
from minitune.ops.backends import backends
from minitune.report.tables import print_table

EXTRAS = {"pyarrow": ("Parquet files", "parquet"), "tensorboard": ("TensorBoard logs", "tensorboard"),
          "triton": ("Triton kernels", "triton")}
"""Package -> (what it is for, the extra of minitune that brings it)."""


def config_of(command: str, base: str) -> ModelConfig:
    """Of a checkpoint folder, or of a named shape. InputError for what is neither."""
    if Path(base).exists():
        return read_config(Path(base))
    try:
        return shape(base)
    except InputError as error:
        reason = str(error).removeprefix("init: ")
        raise InputError(f"{command}: there is no folder {short(base)}, and {reason}") from None


def doctor(base: str, device: str | None, dtype: str | None, tokens: int | None) -> bool:
    """Print what there is and check every op at the shapes of `base`; whether all are right."""
    place = choose_device(device)
    compute = choose_dtype(dtype, place)
    config = config_of("doctor", base)
    count = tokens if tokens is not None else 2048 if place.type == "cuda" else 64
    check_whole("doctor", "tokens", count)
    print_table("This machine", ("", "here"), machine(place, compute))
    print()
    print_table("Backends and what each op takes", ("", "here"), list(backends(place).items()))
    found = list(checks.run(config, count, compute, place))
    rows = [(c.op, c.what, c.backend, f"{c.error:.2e}", f"{c.allowed:.2e}", "right" if c.right else "WRONG")
            for c in found]
    print()
    print_table(f"Ops at the shapes of {base}, {count} tokens, against fp64",
                ("op", "result", "backend", "largest error", "allowed", ""), rows)
    return all(check.right for check in found)


def machine(place: torch.device, compute: torch.dtype) -> list[tuple[str, str]]:
    """(what, what of it is here or why it is not) rows."""
    rows = [("minitune runs on", f"{place}, computing in {str(compute).removeprefix('torch.')}"),
            ("Python, torch", f"{platform.python_version()}, {torch.__version__}"),
            ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"),
            ("GPU", gpu()), ("free memory", f"{free_bytes(place) / 1e9:,.1f} GB on {place}")]
    for package, (purpose, extra) in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        rows.append((purpose, "available" if there else f"not installed: pip install 'minitune[{extra}]'"))
    if place.type == "cuda":
        table = tuned.place(torch.cuda.get_device_name(place))
        rows.append(("measured ways", str(table) if table.exists() else "none: minitune tune measures them"))
    return rows


def gpu() -> str:
    """The GPUs that torch sees, or why there is none."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{each.name}, sm_{each.major}{each.minor}, {each.total_memory / 1e9:,.0f} GB"
                         for each in found)
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA; pytorch.org tells how to install one with it"
    return (f"none: this torch is built for CUDA {torch.version.cuda}, but finds no NVIDIA GPU, or no driver for it "
            "(nvidia-smi tells which)")


def tune(base: str, device: str | None, dtype: str | None, tokens: int, longest: int, rank: int) -> Path:
    """Time every way of the measured ops at the shapes of `base`, print them and write the table -> where it lies."""
    check_whole("tune", "tokens", tokens)
    check_whole("tune", "longest", longest)
    lora = LoRA(rank=rank)
    place = choose_device(device)
    if place.type != "cuda":
        raise InputError("tune: there is nothing to choose without a GPU; what a CPU takes is settled")
    if longest > tokens:
        raise InputError(f"tune: longest is {longest}; it must be between 1 and tokens ({tokens})")
    config = config_of("tune", base)
    network = Llama(config, dtype=torch.bfloat16, device="meta")
    network.add_adapters(lora, seed=0)
    products = {next(iter(p.parts)): (p.n_rows, p.n_columns, p.image_shapes()[0][0]) for p in network.projections()}
    heads = config.n_heads, config.n_kv_heads, config.head_dim
    found = tuning.measure(products, heads, tokens, longest, choose_dtype(dtype, place), place)
    rows = [(op, " x ".join(map(str, at)), way, ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()))
            for op, at, way, times in tuning.shapes(found)]
    print_table("The fastest way of each op", ("op", "shape", "way", "milliseconds"), rows)
    device_name = torch.cuda.get_device_name(place)
    path = tuned.place(device_name)
    tuned.write(path, device_name, found)
    return path
