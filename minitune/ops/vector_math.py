"""vector_math: call MKL's vector functions once on one thread, before several threads call them at once.

torch hands cos, sin, sqrt, log and exp of float tensors on a CPU to MKL, a part on each thread. MKL 2024.2, which torch
2.11 to 2.13 bring, settles at the first call which kernels serve this CPU; a thread that comes in the middle of it gets
inaccurate ones for its part, silently and rarely (https://github.com/pytorch/pytorch/issues/188792).
"""

from __future__ import annotations

import torch

FUNCTIONS = ("cos", "sin", "sqrt", "log", "exp")
"""Those of them that minitune calls."""


def settle() -> None:
    """Call each, in fp32 and fp64, on one element, which one thread does."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(one, name)()
