"""Merging: the base's weights with its adapters added in, one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from minitune.checkpoint.prequantized import find
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.writer import LazyTensor
from minitune.errors import InputError
from minitune.model.llama import Llama
from minitune.model.lora import Adapter

Onto = Literal["loaded", "original"]
"""Into what an adapter is merged: the base as it was loaded (in 4 bits: its decoded values, on which the adapter was
trained), or the 16-bit weights of the checkpoint that were quantised."""


def merged_tensors(network: Llama, checkpoint: Checkpoint | None, onto: Onto) -> dict[str, LazyTensor]:
    """Hugging Face name -> what makes that tensor of the merged model: W + s·B·A, summed in fp32 and rounded once.

    What was neither trained nor adapted nor quantised comes from the file, bit for bit and in its dtype. InputError
    where there is no 16-bit weight to merge into.
    """
    if onto not in get_args(Onto):
        raise InputError(f"merge: onto is {onto!r}; say {' or '.join(get_args(Onto))}")
    adapters, in_4bit = network.adapters(), network.nf4_shapes()
    stored = find(checkpoint) if checkpoint is not None else {}
    trained = {f"{path}.{kind}" for projection in network.projections() if projection.trained
               for path in projection.parts for kind in ("weight", "bias")}
    found = {}
    for name, shape, make in network.dense_weights():
        from_file = checkpoint is not None and name in checkpoint.names() and name not in stored
        if name in in_4bit and onto == "original" and not from_file:
            raise InputError(f"merge: {name} has no 16-bit original in the folder of the base; merge onto the loaded "
                             "base (--onto loaded)")
        fresh = from_file and name not in trained and (name not in in_4bit or onto == "original")
        values, dtype = make, network.dtype
        if checkpoint is not None and fresh and not _trained(network, name):
            dtype = checkpoint.info(name).dtype
            values = functools.partial(_read, checkpoint, name, shape, dtype)
        elif checkpoint is not None and from_file:
            dtype = checkpoint.info(name).dtype
        adapter = adapters.get(name.removesuffix(".weight"))
        found[name] = LazyTensor(shape, dtype, functools.partial(_merge, values, adapter, dtype))
    return found


def _trained(network: Llama, name: str) -> bool:
    """Whether this weight outside the projections is a trained parameter."""
    return any(name == single and getattr(owner, attribute).requires_grad
               for single, owner, attribute in network.single_weights())


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.empty(shape, dtype=dtype)
    checkpoint.read_into(name, values)
    return values


@torch.no_grad()
def _merge(values: Callable[[], Tensor], adapter: Adapter | None, dtype: torch.dtype) -> Tensor:
    base = values()
    if adapter is None:
        return base.to(dtype)
    whole = base.to(adapter.A.device, torch.float32)
    return whole.addmm(adapter.B, adapter.A, alpha=adapter.scale).to(dtype)
