"""sent: a tensor of the host on a device, by a copy that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(value: Tensor, device: torch.device) -> Tensor:
    """`value`, a plain tensor on the host, on `device`. To a GPU it goes through pinned memory: a copy from pageable
    memory would wait for all that the GPU has still to do. torch keeps the pinned memory until the copy is done."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
