"""doctor: what this machine can do, and whether every op is right on it."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

from minitune.api.loading import config_of
from minitune.arguments import check_whole
from minitune.devices import choose_device, choose_dtype
from minitune.model.memory import free_bytes
from minitune.ops import checks, tuned
from minitune.ops.backends import backends
from minitune.report.tables import print_table

EXTRAS = {"pyarrow": ("Parquet files", "parquet"), "tensorboard": ("TensorBoard logs", "tensorboard"),
          "triton": ("Triton kernels", "triton")}
"""Package -> (what it is for, the extra of minitune that brings it)."""


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
