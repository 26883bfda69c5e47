"""written: tells autograd of a tensor that a kernel wrote to in place."""

from __future__ import annotations

import torch
from torch import Tensor


def written(*tensors: Tensor | None) -> None:
    """Move the version counter of each. A kernel that writes through a raw pointer does not, and then a backward that
    saved the tensor before would take the new values for the old ones instead of stopping."""
    torch.autograd.graph.increment_version([x for x in tensors if x is not None])
