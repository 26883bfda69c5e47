"""Reads PEFT's LoRA and DoRA adapters: adapter_config.json with adapter_model.safetensors, strictly.

Field names and the rule by which patterns match follow peft 0.21 (tuners/lora/config.py, utils/other.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.fields import Rule, flag, integer, mapping, number, only, refuse, same, text, texts
from minitune.checkpoint.files import listing, read_json_object, sha256_of
from minitune.checkpoint.folders import ABOUT, PICKLES, adapter_config
from minitune.checkpoint.folders import ADAPTER as CONFIG
from minitune.checkpoint.folders import WEIGHTS as TENSORS
from minitune.checkpoint.patterns import Patterns, compress, same_in_every_layer, short_name
from minitune.checkpoint.reader import FLOATS, Checkpoint
from minitune.config import LINEAR_NAMES, LoRA
from minitune.errors import InputError

_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,200})\."
                   r"lora_(?:(?P<matrix>[AB])\.weight|(?P<m>m)agnitude_vector(?:\.weight)?)")
_BASE = re.compile(r"base_model\.model\.(lm_head|model\.embed_tokens)(?:\.token_adapter)?(?:\.base_layer)?\.weight")


_ROWS = re.compile(r"base_model\.model\.(lm_head|model\.embed_tokens)\.token_adapter\.trainable_tokens_delta")


class TokenTensors(NamedTuple):
    """Trained rows of the vocabulary: their ids, rising, fp32 rows of the embedding [n, d], and of the head or None."""

    ids: tuple[int, ...]
    embedding: Tensor
    head: Tensor | None


class AdapterTensors(NamedTuple):
    """fp32 on the CPU: A [r, in], B [out, r], and DoRA's m [out] or None."""

    A: Tensor
    B: Tensor
    m: Tensor | None = None


_EMPTY: tuple[object, ...] = (None, False, "", [], {})
_ANY_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
FIELDS: dict[str, Rule] = {
    **{name: Rule("read") for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")},
    "use_rslora": Rule("read"),
    "target_modules": Rule("read; the tensors themselves say which modules are adapted"),
    "exclude_modules": Rule("the tensors say which modules are adapted"),
    "layers_to_transform": Rule("the tensors say which modules are adapted"),
    "layers_pattern": Rule("the tensors say which modules are adapted"),
    "peft_type": Rule("other methods compute something else", ("LORA",)),
    "task_type": Rule("minitune trains causal language models", (None, "CAUSAL_LM")),
    "trainable_token_indices": Rule("read"),
    "bias": Rule("trained biases are not supported", ("none",)),
    "fan_in_fan_out": Rule("linears are [out, in]", (None, False)),
    "modules_to_save": Rule("only low-rank adapters are read", (None, [])),
    "use_dora": Rule("read", (None, False, True)),
    "init_lora_weights": Rule("the other ways of starting change the base weights", _ANY_INIT),
    "eva_config": Rule("it only says how the training started"),
    "base_model_name_or_path": Rule("the caller names the base model"),
    "revision": Rule("the caller names the base model"),
    "inference_mode": Rule("the caller decides"),
    "auto_mapping": Rule("how peft finds the base model's class"),
    "peft_version": Rule("where the file comes from"),
    "megatron_core": Rule("unused without megatron_config", (None, "megatron.core")),
    "qalora_group_size": Rule("unused without use_qalora"),
    "runtime_config": Rule("peft ignores it in a file"),
}
"""Fields of adapter_config.json that are known. Any other may only be null, false or empty, which is peft's default."""


def read_adapter(folder: str | Path) -> tuple[LoRA, dict[str, AdapterTensors]]:
    """A PEFT LoRA or DoRA adapter: its LoRA and, by module path, its tensors.

    Targets and patterns of the LoRA name exactly the modules that the tensors adapt: by short names where
    adapter_config.json does so and all layers are alike, else by full paths. Raises InputError for every field or
    tensor that would need something which minitune does not compute.
    """
    folder = Path(folder)
    where = str(folder / CONFIG)
    if not (folder / TENSORS).exists() and any((folder / f"adapter_model{end}").exists() for end in PICKLES):
        raise InputError(f"{folder}: holds its adapter as a pickle, which can run code and is not read; convert it to "
                         f"{TENSORS} with peft's save_pretrained(…, safe_serialization=True)")
    raw = read_json_object(adapter_config(folder))
    _check_fields(where, raw)
    if not (folder / TENSORS).exists():
        raise InputError(f"{folder / TENSORS}: there is no such file; copy it from where {CONFIG} comes")
    with Checkpoint.open_file(folder / TENSORS) as checkpoint:
        if "peft_version" not in raw:       # else PEFT has written the folder anew since
            _check_sum(folder)
        dora = flag(where, "use_dora", raw.get("use_dora", False) or False)
        tensors = _read_tensors(checkpoint, folder / TENSORS, dora)
    rank, alpha = integer(where, "r", raw.get("r", 8)), number(where, "lora_alpha", raw.get("lora_alpha", 8))
    rank_of, alpha_of = _patterns(where, "rank_pattern", raw), _patterns(where, "alpha_pattern", raw)
    ranks = {path: rank_of.find(path, rank) for path in tensors}
    alphas = {path: alpha_of.find(path, alpha) for path in tensors}
    faults = [
        f"{path}: its tensors have rank {a.shape[0]}, but {CONFIG} says {ranks[path]}"
        for path, (a, *_) in tensors.items()
        if a.shape[0] != ranks[path]
    ]
    if faults:
        raise InputError(f"{folder / TENSORS}: {len(faults)} modules do not fit; the two files are not of one "
                         f"adapter, so fetch or copy both again:{listing(faults, 5)}")
    dropout = number(where, "lora_dropout", raw.get("lora_dropout", 0.0), inclusive=True)
    if dropout >= 1:
        refuse(where, "lora_dropout", dropout, "it must be below 1")
    lora = LoRA(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=_targets(where, raw, list(tensors)),
        rslora=flag(where, "use_rslora", raw.get("use_rslora", False)),
        dora=dora,
        rank_pattern=compress(ranks, rank),
        alpha_pattern=compress(alphas, alpha),
    )
    return lora, tensors


def _check_sum(folder: Path) -> None:
    """InputError where ABOUT has another sum than the tensors' file. Other trainers' adapters have none."""
    said = read_json_object(folder / ABOUT).get("sha256") if (folder / ABOUT).exists() else None
    if said is not None and said != sha256_of(folder / TENSORS):
        raise InputError(f"{folder / TENSORS}: its SHA-256 is not the one in {ABOUT}: the file is damaged, or another "
                         f"program has written it anew; copy it again, or, if it is meant, remove sha256 from {ABOUT}")


def _check_fields(where: str, raw: dict[str, Any]) -> None:
    only(where, "peft_type", raw.get("peft_type"), ("LORA",))
    for name, value in raw.items():
        rule = FIELDS.get(name)
        if rule is None:
            if not any(same(value, empty) for empty in _EMPTY):
                refuse(where, short(name), value, "this field is not supported, so it must be null, false or empty")
        else:
            rule.check(where, name, value)


def _read_tensors(checkpoint: Checkpoint, path: Path, dora: bool) -> dict[str, AdapterTensors]:
    """By module path, after every name, dtype and shape was checked. Copies of the base's own embedding or head, which
    PEFT puts beside an adapter on lm_head, are left to `base_copies`."""
    parts: dict[str, dict[str, str]] = {}
    faults = []
    for name in checkpoint.names():
        info, match = checkpoint.info(name), _NAME.fullmatch(name)
        if match is None:
            if not _BASE.fullmatch(name) and not _ROWS.fullmatch(name):
                faults.append(f"{short(name)} is no LoRA tensor of a linear (base_model.model.….lora_A.weight or "
                              "lora_B.weight)")
            continue
        part, kind = match["matrix"] or match["m"], "matrix" if match["matrix"] else "vector"
        if len(info.shape) != (1 if part == "m" else 2) or 0 in info.shape or info.dtype not in FLOATS:
            faults.append(f"{short(name)} is {info.dtype} {list(info.shape)}; it must be a float {kind}")
        elif part in parts.setdefault(match[1], {}):
            faults.append(f"{short(name)} stands there twice")
        else:
            parts[match[1]][part] = name
    shapes = {module: {part: list(checkpoint.info(name).shape) for part, name in found.items()}
              for module, found in parts.items()}
    faults += [fault for module, found in shapes.items() for fault in _misfits(module, found, dora)]
    if faults or not parts:
        raise InputError(f"{path}: {len(faults)} of its tensors cannot be used:{listing(faults or ['it is empty'])}")
    result = {}
    for module, names in parts.items():
        values = {part: checkpoint.read(name, torch.float32) for part, name in names.items()}
        result[module] = AdapterTensors(values["A"], values["B"], values.get("m"))
    return result


def _misfits(module: str, shapes: dict[str, list[int]], dora: bool) -> list[str]:
    """What is wrong with the tensors of one module."""
    if not {"A", "B"} <= shapes.keys():
        there = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}[next(iter(shapes))]
        return [f"{module} has {there}, but not the other half"]
    if shapes["A"][0] != shapes["B"][1]:
        return [f"{module}: A is {shapes['A']} and B is {shapes['B']}; they must share the rank"]
    if ("m" in shapes) != dora:
        return [f"{module} {'has a' if 'm' in shapes else 'lacks its'} lora_magnitude_vector, but {CONFIG} says "
                f"use_dora: {str(dora).lower()}"]
    if dora and shapes["m"] != shapes["B"][:1]:
        return [f"{module}: its lora_magnitude_vector is {shapes['m']}, and B is {shapes['B']}"]
    return []


def base_copies(folder: Path) -> dict[str, Tensor]:
    """Hugging Face name -> the embedding or head that PEFT stored beside an adapter on lm_head, as the file has it."""
    found = {}
    with Checkpoint.open_file(folder / TENSORS) as checkpoint:
        for name in checkpoint.names():
            match = _BASE.fullmatch(name)
            if match is not None:
                found[f"{match[1]}.weight"] = value = torch.empty(
                    checkpoint.info(name).shape, dtype=checkpoint.info(name).dtype)
                checkpoint.read_into(name, value)       # which refuses what is no float
    return found


def _patterns(where: str, name: str, raw: dict[str, Any]) -> Patterns:
    said = mapping(where, name, raw.get(name) or {})
    for key, value in said.items():
        field = f"{name}[{short(key)}]"
        if name == "rank_pattern":
            integer(where, field, value)
        else:
            number(where, field, value)
    return Patterns(f"{where}: {name}", said)


def _targets(where: str, raw: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    said, names = raw.get("target_modules"), sorted({short_name(path) for path in paths})
    if isinstance(said, str):
        text(where, "target_modules", said)
        if re.fullmatch(r"\w+", said) and said not in paths:     # other texts are a stranger's regular expressions
            refuse(where, "target_modules", said, 'a text must match whole paths; write a list such as ["q_proj"]')
    elif said is not None:
        texts(where, "target_modules", said)
        narrowed = any(raw.get(name) not in (None, [], "") for name in ("layers_to_transform", "exclude_modules"))
        _check_targets(where, said, paths, narrowed)
        if sorted(set(said)) == names and not narrowed and same_in_every_layer(paths):
            return tuple(names)
    return tuple(sorted(paths))


def _check_targets(where: str, said: list[str], paths: list[str], narrowed: bool) -> None:
    """Refuse a list that the tensors contradict, by peft's rule: a target is a path, or its end after a dot.

    A name that no model here has may stand idle in the list, as in peft. One of a linear may not: its tensors are lost.
    """
    targets, ends = set(said), {path: _ends(path) for path in paths}
    for path in paths:
        if targets.isdisjoint(ends[path]):
            refuse(where, "target_modules", said, f"but {TENSORS} adapts {path}; fetch or copy both files again")
    adapted = set().union(*ends.values())
    for target in said:
        if short_name(target) in (*LINEAR_NAMES, "lm_head") and target not in adapted and not narrowed:
            refuse(where, "target_modules", said,
                   f"but {TENSORS} has no tensor of {short(target)}; fetch or copy both files again")


def _ends(path: str) -> list[str]:
    return [path, *(path[dot.end():] for dot in re.finditer(r"\.", path))]


def read_token_rows(folder: Path) -> TokenTensors | None:
    """The rows of single tokens that were trained beside the adapter (PEFT's trainable_token_indices), if any."""
    where = str(folder / CONFIG)
    said = _token_ids(where, read_json_object(folder / CONFIG).get("trainable_token_indices"))
    with Checkpoint.open_file(folder / TENSORS) as checkpoint:
        names = {match[1].rpartition(".")[2]: name for name in checkpoint.names() if (match := _ROWS.fullmatch(name))}
        twin = "lm_head" in names and "lm_head" not in said and "embed_tokens" in said     # of a tied head
        extra = sorted(set(names) - set(said) - ({"lm_head"} if twin else set()))
        lacking = [name for name in said if name not in names and name != "lm_head"]    # a tied head has none
        if extra or lacking:
            raise InputError(f"{folder / TENSORS}: {'has' if extra else 'lacks'} trained rows of "
                             f"{(extra or lacking)[0]}, but {CONFIG} says trainable_token_indices: "
                             f"{short(str(said or None))}; fetch or copy both files again")
        if not said:
            return None
        ids = next(iter(said.values()))
        order = sorted(range(len(ids)), key=lambda place: ids[place])
        rows = {}
        for name, tensor in names.items():
            info = checkpoint.info(tensor)
            if len(info.shape) != 2 or info.shape[0] != len(ids) or info.dtype not in FLOATS:
                raise InputError(f"{folder / TENSORS}: {tensor} is {info.dtype} {list(info.shape)}; it must be a float "
                                 f"matrix of {len(ids)} rows, as many as {CONFIG} names tokens")
            rows[name] = checkpoint.read(tensor, torch.float32)
    if twin and not torch.equal(rows["embed_tokens"], rows.pop("lm_head")):
        raise InputError(f"{folder / TENSORS}: its trained rows of lm_head are not those of embed_tokens, but {CONFIG} "
                         "names no rows of lm_head; fetch or copy both files again")
    return TokenTensors(tuple(ids[place] for place in order), rows["embed_tokens"][order],
                        rows["lm_head"][order] if "lm_head" in rows else None)


def _token_ids(where: str, value: Any) -> dict[str, list[int]]:
    """trainable_token_indices as module -> ids: a list means the embedding's."""
    said = {"embed_tokens": value} if isinstance(value, list) and value else value or {}
    accepted = 'a list of token ids, or {"embed_tokens": ids, "lm_head": the same ids}'
    if not isinstance(said, dict) or not (said.keys() <= {"embed_tokens", "lm_head"}) or ("lm_head" in said and (
            said.get("embed_tokens") != said["lm_head"])):
        refuse(where, "trainable_token_indices", value, f"it must be {accepted}")
    for ids in said.values():
        if not isinstance(ids, list) or not ids or len(set(map(str, ids))) < len(ids) or any(
                type(token) is not int or not 0 <= token < 2**31 for token in ids):
            refuse(where, "trainable_token_indices", value, f"it must be {accepted}, each once")
    return dict(said)
