"""environment: what a reader of a run needs to know of the machine and the software that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("minitune", "torch", "triton", "tokenizers", "sentencepiece")
ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where minitune runs from one."""
DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: str) -> dict[str, Any]:
    """Versions, device, driver and, where minitune runs from a checkout, its commit. No host name, no user, no path."""
    place = torch.device(device)
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": _gpu(place) if place.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "driver": DRIVER.read_text().splitlines()[0].strip() if DRIVER.is_file() else None,
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory": found.total_memory}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    """What git says of the checkout; None where minitune is installed elsewhere, or git is missing."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
