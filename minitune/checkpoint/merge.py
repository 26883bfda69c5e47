"""Weights to be written, one tensor at a time: the base's as they are, or with its adapters added in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from minitune.checkpoint.prequantized import find
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.weights import EMBEDDING, HEAD_WEIGHT
from minitune.checkpoint.writer import LazyTensor
from minitune.config import ModelConfig, Onto
from minitune.errors import InputError
from minitune.model.adapter import HEAD, Adapter
from minitune.model.llama import Llama
from minitune.model.token_rows import TokenRows
from minitune.ops import dora


def base_tensors(network: Llama, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Hugging Face name -> what makes that tensor of the base in `dtype`; trained weights are rounded from fp32."""
    return {name: LazyTensor(shape, dtype, functools.partial(_rounded, make, dtype))
            for name, shape, _, make in network.dense_weights()}


def _rounded(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().to(dtype)


def merged_tensors(network: Llama, checkpoint: Checkpoint | None, onto: Onto) -> dict[str, LazyTensor]:
    """Hugging Face name -> what makes that tensor of the merged model: W + s·B·A, summed in fp32 and rounded once; with
    DoRA its rows brought to the lengths m.

    What was neither trained nor adapted nor quantised comes from the file, bit for bit and in its dtype; what the file
    has in 4 bits gets the dtype it was quantised from. InputError where there is no 16-bit weight to merge into.
    """
    if onto not in get_args(Onto):
        raise InputError(f"merge: onto is {onto!r}; say {' or '.join(get_args(Onto))}")
    adapters, in_4bit, trained = network.adapters(), network.nf4_shapes(), network.trained_names()
    stored = {} if checkpoint is None else find(checkpoint)
    on_disk = {} if checkpoint is None else {name: checkpoint.info(name).dtype for name in checkpoint.names()
                                             if name not in stored}
    found = {}
    for name, shape, dtype, make in network.dense_weights():
        if name in in_4bit and onto == "original" and name not in on_disk:
            raise InputError(f"merge: {name} has no 16-bit original in the folder of the base; merge onto the loaded "
                             "base (--onto loaded)")
        dtype, values = on_disk.get(name, dtype), make
        if checkpoint is not None and name in on_disk and name not in trained and (
                name not in in_4bit or onto == "original"):
            values = functools.partial(_read, checkpoint, name, shape, dtype, make)
        names = [name, HEAD_WEIGHT] if name == EMBEDDING and network.config.tied_head and HEAD in adapters else [name]
        for written in names:       # a tied head with an adapter becomes one of its own
            adapter, rows = adapters.get(written.removesuffix(".weight")), network.output.rows
            rows = rows if written in (EMBEDDING, HEAD_WEIGHT) else None
            found[written] = LazyTensor(shape, dtype, functools.partial(_merge, written, values, adapter, rows, dtype))
    return found


def merged_config(network: Llama) -> ModelConfig:
    """That of the merged model: a head that was tied to the embedding is one of its own once an adapter went into it.
    """
    return replace(network.config, tied_head=network.config.tied_head and HEAD not in network.adapters())


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype,
          make: Callable[[], Tensor]) -> Tensor:
    """The file's values; where the vocabulary has grown since, the new rows are the network's."""
    values = checkpoint.read(name, dtype)
    return values if values.shape == shape else torch.cat([values, make()[len(values):].to(values.device, dtype)])


@torch.no_grad()
def _merge(name: str, values: Callable[[], Tensor], adapter: Adapter | None, rows: TokenRows | None,
           dtype: torch.dtype) -> Tensor:
    base = values()
    if adapter is None:
        return base.to(dtype) if rows is None else rows.written(base.to(dtype), name == HEAD_WEIGHT)
    assert rows is None, "load refuses trained rows beside an adapter on the head"
    whole = base.to(adapter.A.device, torch.float32, copy=True)
    whole.addmm_(adapter.B, adapter.A, alpha=adapter.scale)
    if adapter.m is not None:
        whole *= adapter.gain(dora.row_lengths(whole, None, None))[:, None]
    merged = whole.to(dtype)
    if not bool(merged.isfinite().all()):
        raise InputError(f"merge: {name} with its adapter holds values that are not finite in {dtype}")
    return merged
