"""tune: times every way of an op at a model's shapes on this GPU, and keeps which is the fastest."""

from __future__ import annotations

from pathlib import Path

import torch

from minitune.api.loading import config_of
from minitune.arguments import check_whole
from minitune.config import LoRA
from minitune.devices import choose_device, choose_dtype
from minitune.errors import InputError
from minitune.model.llama import Llama
from minitune.ops import tuned, tuning
from minitune.report.tables import print_table


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
    normed = [next(iter(p.parts)) for p in (network.blocks()[0].attention.qkv, network.blocks()[0].mlp.gate_up)]
    heads = config.n_heads, config.n_kv_heads, config.head_dim
    found = tuning.measure(products, normed, heads, tokens, longest, choose_dtype(dtype, place), place)
    rows = [(op, " x ".join(map(str, at)), way, ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()))
            for op, at, way, times in tuning.shapes(found)]
    print_table("The fastest way of each op", ("op", "shape", "way", "milliseconds"), rows)
    device_name = torch.cuda.get_device_name(place)
    path = tuned.place(device_name)
    tuned.write(path, device_name, found)
    return path
