"""init_weights: random weights for a network that no checkpoint fills."""

from __future__ import annotations

import zlib

import torch

from minitune.model.llama import Llama


@torch.no_grad()
def init_weights(network: Llama, seed: int, std: float = 0.02) -> None:
    """Random weights: norms 1, biases 0, the rest normal with `std`, those that write to the residual stream narrower
    by sqrt(2·layers) (Radford et al. 2019), each from the seed and its own name."""
    for name, weight in network.hf_weights().items():
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            scale = std / (2 * network.config.n_layers) ** 0.5 if narrow else std
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32).mul_(scale))
