"""init_weights, fill_random: random weights for a network that no checkpoint fills."""

from __future__ import annotations

import zlib

import torch

from minitune.model.llama import Llama
from minitune.ops import nf4

STD = 0.02
"""Standard deviation of the weights."""


@torch.no_grad()
def init_weights(network: Llama, seed: int, std: float = STD) -> None:
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


@torch.no_grad()
def fill_random(network: Llama, double_quant: bool) -> None:
    """Random weights, made on the network's device: norms 1, biases 0, the rest normal with STD, in NF4 (with
    `double_quant` or without) where the network has it so. Quick, and on another device others; to measure with."""
    generator = torch.Generator(network.device).manual_seed(0)
    for name, weight in network.hf_weights().items():
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            weight.normal_(0, STD, generator=generator)
    for name, shape in network.nf4_shapes().items():
        weight = torch.empty(shape, dtype=network.dtype, device=network.device).normal_(0, STD, generator=generator)
        network.put_nf4(name, nf4.quantize(weight, double_quant))
