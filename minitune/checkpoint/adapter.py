"""PEFT's LoRA and DoRA adapters: written as adapter_config.json with adapter_model.safetensors, and put into a network.

`adapter_reader.py` reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.adapter_reader import AdapterTensors, TokenTensors
from minitune.checkpoint.files import json_bytes, listing, read_json_object, staged
from minitune.checkpoint.folders import ABOUT
from minitune.checkpoint.folders import ADAPTER as CONFIG
from minitune.checkpoint.folders import WEIGHTS as TENSORS
from minitune.checkpoint.patterns import compress, short_name
from minitune.checkpoint.weights import EMBEDDING
from minitune.checkpoint.writer import Summed, write_safetensors
from minitune.config import LoRA
from minitune.errors import InputError
from minitune.model.adapter import Adapter
from minitune.model.llama import Llama
from minitune.model.token_rows import TokenRows

PREFIX = "base_model.model."


def write_adapter(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    lora: LoRA,
    base: str | None,
    linears: Collection[str],
    rows: TokenRows | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write PEFT's two files, fp32, under temporary names and then renamed; peft, transformers and vLLM load them. And
    ABOUT: the sum of the tensors' file, and `about`, for which PEFT has no fields.

    ``adapters``: Hugging Face module path ("model.layers.0.self_attn.q_proj") -> adapter. ``linears``: the paths of
    all of the network's linears; ``target_modules`` holds short names where these select exactly the adapted ones.
    ``rows``: trained rows of the vocabulary, which peft calls trainable tokens.
    """
    if not adapters:
        raise InputError(f"{folder}: there is no adapter to write")
    rank = _most_common([adapter.rank for adapter in adapters.values()], lora.rank)
    alpha = _most_common([float(adapter.alpha) for adapter in adapters.values()], float(lora.alpha))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": float(lora.dropout),
        "target_modules": _target_modules(list(adapters), linears),
        "rank_pattern": compress({path: each.rank for path, each in adapters.items()}, rank),
        "alpha_pattern": compress({path: _plain(each.alpha) for path, each in adapters.items()}, _plain(alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "trainable_token_indices": None if rows is None else _token_indices(rows),
    }
    tensors = {}
    for path, adapter in adapters.items():
        for letter, tensor in (("A", adapter.A), ("B", adapter.B)):
            tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor.detach().float()
        if adapter.m is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = adapter.m.detach().float()
    if rows is not None:
        for name, values in (("model.embed_tokens", rows.embedding), ("lm_head", rows.head)):
            if values is not None:
                tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = values.detach().float()
    with staged(Path(folder)) as staging:
        with staging.open(TENSORS) as file:
            summed = Summed(file)
            write_safetensors(summed, tensors)
        staging.write(ABOUT, json_bytes({"sha256": summed.sha256, **about}))
        staging.write(CONFIG, json_bytes(config))
        staging.remove_first(CONFIG)  # an old alpha over new tensors would go unseen


def _token_indices(rows: TokenRows) -> list[int] | dict[str, list[int]]:
    """A list where the head is tied to the embedding, as peft has it."""
    ids = list(rows.ids)
    return ids if rows.head is None else {"embed_tokens": ids, "lm_head": ids}


def _plain(value: float) -> float:
    """An integral float as int: peft declares lora_alpha as int."""
    return int(value) if float(value).is_integer() else float(value)


def _most_common(values: list[Any], preferred: Any) -> Any:
    counts = Counter(values)
    return preferred if counts[preferred] == max(counts.values()) else counts.most_common(1)[0][0]


def _target_modules(paths: list[str], linears: Collection[str]) -> list[str]:
    names = sorted({short_name(path) for path in paths})
    exact = {path for path in linears if short_name(path) in names} == set(paths)
    return names if exact else sorted(paths)


def match_adapter(found: Mapping[str, AdapterTensors], adapters: Mapping[str, Adapter],
                  folder: Path | None = None, base: Path | None = None) -> None:
    """Copy what ``read_adapter`` found into the network's adapters: each module exactly once, equal shapes.

    Every missing, extra and misshapen tensor counts in ONE InputError, before anything is copied. It names the
    adapter's folder and the base's, where they are given.
    """
    faults = [f"{path} is adapted here, but missing in the file" for path in adapters if path not in found]
    faults += [f"{path} is in the file, but not adapted here" for path in found if path not in adapters]
    for path in found.keys() & adapters.keys():
        for letter, source, out in _pairs(found[path], adapters[path]):
            if source.shape != out.shape:
                faults.append(f"{path}: {letter} has shape {list(source.shape)}; the network needs {list(out.shape)}")
    if faults:
        raise InputError(f"{folder or 'the adapter'}: does not fit {base or 'the model'}: {len(faults)} faults; "
                         f"{trained_on(folder)}:{listing(sorted(faults), 4)}")
    with torch.no_grad():
        for path, tensors in found.items():
            for _, source, out in _pairs(tensors, adapters[path]):
                out.copy_(source)


def _pairs(found: AdapterTensors, adapter: Adapter) -> list[tuple[str, Tensor, Tensor]]:
    """(letter, tensor of the file, tensor of the network)."""
    pairs: list[tuple[str, Tensor, Tensor]] = [("A", found.A, adapter.A), ("B", found.B, adapter.B)]
    return pairs if found.m is None or adapter.m is None else [*pairs, ("m", found.m, adapter.m)]


def trained_on(folder: Path | None) -> str:
    """What adapter_config.json says of its base, and the advice that follows."""
    said = None if folder is None else read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return "load the base that it was trained on, or another adapter"
    return f"{CONFIG} says that it was trained on {short(said)}: load that base, or another adapter"


@torch.no_grad()
def match_rows(found: TokenTensors, rows: TokenRows, folder: Path) -> None:
    """Copy trained token rows into the network's. InputError where they are of another width."""
    for name, source, out in (("embed_tokens", found.embedding, rows.embedding), ("lm_head", found.head, rows.head)):
        if source is not None and out is not None:      # a head without rows of its own keeps the base's
            if source.shape != out.shape:
                raise InputError(f"{folder / TENSORS}: its token rows of {name} have {source.shape[1]} elements, the "
                                 f"model's {out.shape[1]}; load the base that it was trained on")
            out.copy_(source)


@torch.no_grad()
def take_copies(folder: Path, copies: Mapping[str, Tensor], network: Llama, vocab_size: int) -> None:
    """What `base_copies` found: its first `vocab_size` rows must be the base's, those behind them, of a vocabulary that
    had grown, are put into the network. InputError for an embedding or head that was trained as a whole: PEFT stores a
    copy of the base's beside an adapter on lm_head, and another one would be lost."""
    weights = network.hf_weights()
    for name, copy in copies.items():
        base = weights.get(EMBEDDING if network.config.tied_head else name)
        if base is None or base.shape[1:] != copy.shape[1:] or len(copy) < vocab_size or not torch.equal(
                copy[:vocab_size].to(base.dtype), base[:vocab_size].cpu()):
            raise InputError(f"{folder / TENSORS}: its {name} is not the base's; a changed embedding or head beside an "
                             "adapter is not supported: load the base that it was trained on, or merge it with peft")
        base[vocab_size : len(copy)] = copy[vocab_size:].to(base.device, base.dtype)
