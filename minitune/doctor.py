"""doctor and tune: what this machine can do, whether every op is right on it, and which way of an op is the fastest."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from minitune.checkpoint.hf_config import read_config
from minitune.config import LoRA, ModelConfig
from minitune.devices import choose_device, choose_dtype
from minitune.errors import InputError
from minitune.model.llama import Llama
from minitune.model.shapes import shape
from minitune.ops import checks, tuned, tuning
from minitune.ops.backends import backends
from minitune.report.tables import print_table


def config_of(base: str) -> ModelConfig:
    """Of a checkpoint folder, or of a named shape."""
    return read_config(Path(base)) if Path(base).is_dir() else shape(base)


def doctor(base: str, device: str | None, dtype: str | None, tokens: int | None) -> bool:
    """Print what there is and check every op at the shapes of `base`; whether all are right."""
    place = choose_device(device)
    compute = choose_dtype(dtype, place)
    config = config_of(base)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}, "
          f"compute in {str(compute).removeprefix('torch.')}")
    print_table("Backends and what each op takes", ("", "here"), list(backends(place).items()))
    count = tokens or (2048 if place.type == "cuda" else 64)
    found = list(checks.run(config, count, compute, place))
    rows = [(c.op, c.what, c.backend, f"{c.error:.2e}", f"{c.allowed:.2e}", "right" if c.right else "WRONG")
            for c in found]
    print()
    print_table(f"Ops at the shapes of {base}, {count} tokens, against fp64",
                ("op", "result", "backend", "largest error", "allowed", ""), rows)
    return all(check.right for check in found)


def tune(base: str, device: str | None, dtype: str | None, tokens: int, longest: int, rank: int) -> Path:
    """Time every way of the measured ops at the shapes of `base`, print them and write the table -> where it lies."""
    place = choose_device(device)
    if place.type != "cuda":
        raise InputError("tune: there is nothing to choose without a GPU; what a CPU takes is settled")
    if not 0 < longest <= tokens:
        raise InputError(f"tune: longest is {longest}; it must be between 1 and tokens ({tokens})")
    config = config_of(base)
    network = Llama(config, dtype=torch.bfloat16, device="meta")
    network.add_adapters(LoRA(rank=rank), seed=0)
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
