"""What every launcher asks: which generation of GPU this is, and what a kernel is launched with there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """`tiles`: the kernel's sizes, constexpr name -> value; the rest as Triton names it. `registers` a thread and
    bytes of `shared` memory are what the kernel may cost: tests/kernels/test_aot.py holds both."""

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    registers: int = 255
    shared: int = 0

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def arguments(self) -> dict[str, Any]:
        """Tiles and options, as a launch takes them."""
        return {**self.tiles, **self.options()}


@functools.lru_cache(maxsize=16)
def generation(device: torch.device) -> int:
    """80 (A100), 89 (RTX 40, L4), 90 (H100, H200), 100 (B200), …; 90 for the interpreter on a CPU. RTX 50 (sm_120) has
    the shared memory and the matrix unit of an 89."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 89 if major == 12 else 10 * major + minor


def pick(configs: Mapping[int, Config], device: torch.device) -> Config:
    """The entry of the newest generation that is not newer than the device (the oldest one for what is older)."""
    own = generation(device)
    return configs[max((known for known in configs if known <= own), default=min(configs))]
