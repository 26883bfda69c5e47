"""A whole model's weights: from a checkpoint into the network's tensors, and back into files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitune.arguments import short
from minitune.checkpoint import prequantized
from minitune.checkpoint.files import json_bytes, listing, staged
from minitune.checkpoint.reader import FLOATS, INDEX, SINGLE, Checkpoint
from minitune.checkpoint.writer import LazyTensor, write_safetensors
from minitune.errors import InputError
from minitune.ops import nf4
from minitune.ops.nf4 import NF4Weight

EMBEDDING, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


class Quantized(NamedTuple):
    """The weights that shall lie in NF4: Hugging Face name -> [rows, columns], whom each is given to, and how it is
    quantised where the checkpoint has it in 16 or 32 bits."""

    shapes: Mapping[str, tuple[int, int]]
    put: Callable[[str, NF4Weight | Tensor], None]
    device: torch.device
    dtype: torch.dtype
    double_quant: bool
    keep: bool
    """Leave in 16 bits what the checkpoint has so: it says itself what is quantised."""


Homes = Iterable[tuple[list[str], nn.Parameter]]
"""Hugging Face names, and the Parameter that is those tensors' rows, below each other."""


def load_weights(checkpoint: Checkpoint, destination: Mapping[str, Tensor], tied_head: bool,
                 quantized: Quantized | None = None, homes: Homes = ()) -> list[str]:
    """Fill every tensor of ``destination`` (Hugging Face name -> view) and return the extras that were tolerated.

    On a CPU a Parameter of ``homes`` that a file has as it is moves there and is not copied (`Checkpoint.mapped`): the
    views of its names in ``destination`` then stay as they were.

    Tolerated: ``*.rotary_emb.inv_freq``, which config.json already says, and with ``tied_head`` an ``lm_head.weight``
    that equals the embedding byte by byte. Every missing, extra, misshapen or wrongly typed tensor comes in ONE
    InputError, before anything is read. Weights that are quantised pass one by one through one buffer on their device.
    """
    try:
        return _load(checkpoint, destination, tied_head, quantized, homes)
    finally:
        checkpoint.close()  # it opens again if it is asked again


def _load(checkpoint: Checkpoint, destination: Mapping[str, Tensor], tied_head: bool,
          quantized: Quantized | None, homes: Homes) -> list[str]:
    stored = prequantized.find(checkpoint) if quantized and quantized.keep else {}
    if quantized and quantized.keep and not stored:
        raise InputError(f"{_where(checkpoint)}: config.json has a quantization_config, but no tensor is quantised; "
                         "delete that field")
    companions = {name for names in stored.values() for name in names}
    found = dict.fromkeys(name for name in checkpoint.names() if name not in companions)
    slots = quantized.shapes if quantized else {}
    destination = {**destination, **{name: torch.empty(shape, device="meta") for name, shape in slots.items()}}
    extra = [name for name in found if name not in destination]
    if any(f"model.{name}" in destination for name in extra):
        raise InputError(
            f"{_where(checkpoint)}: its tensors lack the prefix 'model.' ({short(extra[0])}): this is the bare "
            "transformer without its head, which is not supported; export the model as …ForCausalLM"
        )
    tolerated = [name for name in extra if name.endswith(".rotary_emb.inv_freq")]
    faults = []
    if tied_head and HEAD_WEIGHT in extra:
        if EMBEDDING in destination and EMBEDDING in found and checkpoint.same_bytes(HEAD_WEIGHT, EMBEDDING):
            tolerated.append(HEAD_WEIGHT)
        else:
            faults.append(f"{HEAD_WEIGHT} differs from {EMBEDDING}, though config.json ties them (tie_word_embeddings)")
    settled = {*tolerated, HEAD_WEIGHT} if tied_head else set(tolerated)
    refused = [name for name in extra if name not in settled]
    faults += _missing(checkpoint, destination) + [f"{short(name)} is not part of this model" for name in refused]
    for name in destination:
        if name in found and not (name in stored and name in slots):     # those are checked as they are read
            faults += _misfit(checkpoint, name, destination[name])
    if faults:
        hint = ""
        if any(".weight." in name for name in refused):
            hint = "\nIt looks quantised, but config.json has no quantization_config that says how."
        raise InputError(f"{_where(checkpoint)}: {len(faults)} tensors do not fit; "
                         f"{_advice(found, destination)}:{listing(faults)}{hint}")
    if any(view.device.type == "meta" for name, view in destination.items() if name not in slots):
        return tolerated      # only the names and shapes were asked about
    mapped = _map(checkpoint, homes)
    # In the order of the files, so that disks and caches see one stream.
    scratch: dict[torch.dtype, Tensor] = {}
    for name in found:
        if quantized and name in slots:
            if name in stored:
                quantized.put(name, prequantized.read(checkpoint, name, slots[name], quantized.device))
            else:
                quantized.put(name, _read_quantized(checkpoint, name, quantized, scratch))
        elif name in destination and name not in mapped:
            checkpoint.read_into(name, destination[name])
    return tolerated


def _map(checkpoint: Checkpoint, homes: Homes) -> set[str]:
    """Move the Parameters that a file has as they are there -> the names of their tensors."""
    found: set[str] = set()
    places = {name: place for place, name in enumerate(checkpoint.names())}
    on_cpu = [(names, home) for names, home in homes if home.device.type == "cpu"]
    for names, home in sorted(on_cpu, key=lambda pair: places[pair[0][0]]):
        values = checkpoint.mapped(names, home.dtype)
        if values is not None:
            home.data = values
            found.update(names)
    return found


def _read_quantized(checkpoint: Checkpoint, name: str, quantized: Quantized,
                    scratch: dict[torch.dtype, Tensor]) -> NF4Weight | Tensor:
    """A weight in the file's own dtype, read into scratch memory on the device and quantised there."""
    shape, dtype = quantized.shapes[name], checkpoint.info(name).dtype
    if quantized.keep:
        return checkpoint.read(name, quantized.dtype, quantized.device)
    count = math.prod(shape)
    if dtype not in scratch or scratch[dtype].numel() < count:
        scratch.clear()      # first give back, then take: one buffer is there at a time
        scratch[dtype] = torch.empty(count, dtype=dtype, device=quantized.device)
    values = scratch[dtype][:count].view(shape)
    checkpoint.read_into(name, values)
    return nf4.quantize(values, quantized.double_quant)


def _where(checkpoint: Checkpoint) -> str:
    names = checkpoint.names()
    return str(checkpoint.path(names[0]).parent) if names else "the checkpoint, which has no tensors"


def _advice(found: Iterable[str], destination: Iterable[str]) -> str:
    there, wanted = (1 + max((int(match[1]) for match in map(_LAYER.match, names) if match), default=-1)
                     for names in (found, destination))
    differ = f"the weights have {there} layers, config.json says {wanted} (num_hidden_layers); "
    return (f"{differ if there != wanted else ''}config.json and the weights are not of one model, or not whole: fetch "
            "both again, from one place")


def _missing(checkpoint: Checkpoint, destination: Mapping[str, Tensor]) -> list[str]:
    found = set(checkpoint.names())
    tie = "; should config.json say tie_word_embeddings?"
    return [f"{name} is missing{tie if name == HEAD_WEIGHT else ''}" for name in destination if name not in found]


def _misfit(checkpoint: Checkpoint, name: str, out: Tensor) -> list[str]:
    info = checkpoint.info(name)
    if info.shape != tuple(out.shape):
        return [f"{name} has shape {list(info.shape)}, but config.json needs {list(out.shape)}"]
    if info.dtype not in FLOATS:
        return [f"{name} is {info.dtype}; float32, float16 and bfloat16 are read"]
    return []


def save_weights(folder: str | Path, tensors: Mapping[str, Tensor | LazyTensor], shard_bytes: float = 5e9) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` with an index where one file is too small.

    Files are written one after another under temporary names, synced and then renamed; a failure leaves what was
    there. An older model in the folder is replaced. Raises InputError where the disk refuses.
    """
    folder = Path(folder)
    shards: list[dict[str, Tensor | LazyTensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + n_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + n_bytes, total + n_bytes
    many = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if many else [SINGLE]
    with staged(folder) as staging, torch.no_grad():
        for name, shard in zip(names, shards, strict=True):
            with staging.open(name) as file:
                write_safetensors(file, shard)
        if many:
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in sorted(shard)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            staging.write(INDEX, json_bytes(index))
            # The reader prefers the single file, and an old index must never stand over new shards.
            staging.remove_first(SINGLE, INDEX)
    for path in folder.glob("model-?????-of-?????.safetensors"):
        if path.name not in names:
            path.unlink()
    if not many:
        (folder / INDEX).unlink(missing_ok=True)
