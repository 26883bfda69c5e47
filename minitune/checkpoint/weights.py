"""A whole model's weights: from a checkpoint into the network's tensors, and back into files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minitune.checkpoint.files import json_bytes, listing, show, staged
from minitune.checkpoint.reader import FLOATS, INDEX, SINGLE, Checkpoint
from minitune.checkpoint.writer import write_safetensors
from minitune.errors import InputError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def load_weights(checkpoint: Checkpoint, destination: Mapping[str, Tensor], tied_head: bool) -> list[str]:
    """Fill every tensor of ``destination`` (Hugging Face name -> view) and return the extras that were tolerated.

    Tolerated: ``*.rotary_emb.inv_freq``, which config.json already says, and with ``tied_head`` an ``lm_head.weight``
    that equals the embedding byte by byte. Every missing, extra, misshapen or wrongly typed tensor comes in ONE
    InputError, before anything is read.
    """
    try:
        return _load(checkpoint, destination, tied_head)
    finally:
        checkpoint.close()  # it opens again if it is asked again


def _load(checkpoint: Checkpoint, destination: Mapping[str, Tensor], tied_head: bool) -> list[str]:
    found = dict.fromkeys(checkpoint.names())
    extra = [name for name in found if name not in destination]
    if any(f"model.{name}" in destination for name in extra):
        raise InputError(
            f"{_where(checkpoint)}: its tensors lack the prefix 'model.' ({show(extra[0])}): this is the bare "
            "transformer without its head, which is not supported; export the model as …ForCausalLM"
        )
    tolerated = [name for name in extra if name.endswith(".rotary_emb.inv_freq")]
    faults = []
    if tied_head and HEAD in extra:
        if EMBEDDING in destination and EMBEDDING in found and checkpoint.same_bytes(HEAD, EMBEDDING):
            tolerated.append(HEAD)
        else:
            faults.append(f"{HEAD} differs from {EMBEDDING}, though config.json ties them (tie_word_embeddings)")
    settled = {*tolerated, HEAD} if tied_head else set(tolerated)
    refused = [name for name in extra if name not in settled]
    faults += _missing(checkpoint, destination) + [f"{show(name)} is not part of this model" for name in refused]
    for name in destination:
        if name in found:
            faults += _misfit(checkpoint, name, destination[name])
    if faults:
        hint = ""
        if any(".weight." in name for name in refused):
            hint = "\nIt looks quantised; quantised checkpoints are not supported yet."
        raise InputError(f"{_where(checkpoint)}: {len(faults)} tensors do not fit:{listing(faults)}{hint}")
    # In the order of the files, so that disks and caches see one stream.
    for name in found:
        if name in destination:
            checkpoint.read_into(name, destination[name])
    return tolerated


def _where(checkpoint: Checkpoint) -> str:
    names = checkpoint.names()
    return str(checkpoint.path(names[0]).parent) if names else "the checkpoint, which has no tensors"


def _missing(checkpoint: Checkpoint, destination: Mapping[str, Tensor]) -> list[str]:
    found = set(checkpoint.names())
    tie = "; should config.json say tie_word_embeddings?"
    return [f"{name} is missing{tie if name == HEAD else ''}" for name in destination if name not in found]


def _misfit(checkpoint: Checkpoint, name: str, out: Tensor) -> list[str]:
    info = checkpoint.info(name)
    if info.shape != tuple(out.shape):
        return [f"{name} has shape {list(info.shape)}, but config.json needs {list(out.shape)}"]
    if info.dtype not in FLOATS:
        return [f"{name} is {info.dtype}; float32, float16 and bfloat16 are read"]
    return []


def save_weights(folder: str | Path, tensors: Mapping[str, Tensor], shard_bytes: float = 5e9) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` with an index where one file is too small.

    Files are written one after another under temporary names, synced and then renamed; a failure leaves what was
    there. An older model in the folder is replaced. Raises InputError where the disk refuses.
    """
    folder = Path(folder)
    shards: list[dict[str, Tensor]] = [{}]
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
