"""PEFT's LoRA adapters: adapter_config.json with adapter_model.safetensors, written and read.

Field names and the rule by which patterns match follow peft 0.21 (tuners/lora/config.py, utils/other.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minitune.checkpoint.fields import flag, integer, mapping, number, only, refuse, same, text, texts
from minitune.checkpoint.files import json_bytes, listing, read_json_object, show, staged
from minitune.checkpoint.folders import ADAPTER as CONFIG
from minitune.checkpoint.folders import PICKLES, adapter_config
from minitune.checkpoint.folders import WEIGHTS as TENSORS
from minitune.checkpoint.patterns import Patterns, compress
from minitune.checkpoint.reader import FLOATS, Checkpoint
from minitune.checkpoint.writer import write_safetensors
from minitune.config import LINEAR_NAMES, LoRA
from minitune.errors import InputError

PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,200})\.lora_([AB])\.weight")


class Adapter(Protocol):
    """What a network's adapter shows: A [rank, in] and B [out, rank], the rank and the numerator of its scale."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...


@dataclass(frozen=True)
class _Rule:
    """What adapter_config.json may say in a field that is not read otherwise. ``only`` is None: anything."""

    why: str
    only: tuple[object, ...] | None = None


_EMPTY: tuple[object, ...] = (None, False, "", [], {})
_ANY_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
FIELDS: dict[str, _Rule] = {
    **{name: _Rule("read") for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")},
    "use_rslora": _Rule("read"),
    "target_modules": _Rule("read; the tensors themselves say which modules are adapted"),
    "exclude_modules": _Rule("the tensors say which modules are adapted"),
    "layers_to_transform": _Rule("the tensors say which modules are adapted"),
    "layers_pattern": _Rule("the tensors say which modules are adapted"),
    "peft_type": _Rule("other methods compute something else", ("LORA",)),
    "task_type": _Rule("minitune trains causal language models", (None, "CAUSAL_LM")),
    "bias": _Rule("trained biases are not supported", ("none",)),
    "fan_in_fan_out": _Rule("linears are [out, in]", (None, False)),
    "modules_to_save": _Rule("only low-rank adapters are read", (None, [])),
    "use_dora": _Rule("DoRA adapters are not supported yet", (None, False)),
    "init_lora_weights": _Rule("the other ways of starting change the base weights", _ANY_INIT),
    "eva_config": _Rule("it only says how the training started"),
    "base_model_name_or_path": _Rule("the caller names the base model"),
    "revision": _Rule("the caller names the base model"),
    "inference_mode": _Rule("the caller decides"),
    "auto_mapping": _Rule("how peft finds the base model's class"),
    "peft_version": _Rule("where the file comes from"),
    "megatron_core": _Rule("unused without megatron_config", (None, "megatron.core")),
    "qalora_group_size": _Rule("unused without use_qalora"),
    "runtime_config": _Rule("peft ignores it in a file"),
}
"""Fields of adapter_config.json that are known. Any other may only be null, false or empty, which is peft's default."""


def write_adapter(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    lora: LoRA,
    base: str | None,
    linears: Collection[str] | None = None,
) -> None:
    """Write PEFT's two files, fp32, under temporary names and then renamed; peft, transformers and vLLM load them.

    ``adapters``: Hugging Face module path ("model.layers.0.self_attn.q_proj") -> adapter. ``linears`` are the paths of
    all of the network's linears, if the caller knows them: ``target_modules`` then holds short names wherever these
    select exactly the adapted modules. Without it, short names are written only where ``lora.targets`` said so.
    """
    if lora.dora:
        raise InputError("LoRA: adapters with dora=True cannot be written yet")
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
        "target_modules": _target_modules(list(adapters), lora, linears),
        "rank_pattern": compress({path: each.rank for path, each in adapters.items()}, rank),
        "alpha_pattern": compress({path: _plain(each.alpha) for path, each in adapters.items()}, _plain(alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "use_rslora": lora.rslora,
        "use_dora": False,
    }
    tensors = {}
    for path, adapter in adapters.items():
        for letter, tensor in (("A", adapter.A), ("B", adapter.B)):
            tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor.detach().float()
    with staged(Path(folder)) as staging:
        with staging.open(TENSORS) as file:
            write_safetensors(file, tensors)
        staging.write(CONFIG, json_bytes(config))
        staging.remove_first(CONFIG)  # an old alpha over new tensors would go unseen


def _plain(value: float) -> float:
    """An integral float as int: peft declares lora_alpha as int."""
    return int(value) if float(value).is_integer() else float(value)


def _most_common(values: list[Any], preferred: Any) -> Any:
    counts = Counter(values)
    return preferred if counts[preferred] == max(counts.values()) else counts.most_common(1)[0][0]


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _target_modules(paths: list[str], lora: LoRA, linears: Collection[str] | None) -> list[str]:
    names = sorted({_short(path) for path in paths})
    if linears is not None:
        exact = {path for path in linears if _short(path) in names} == set(paths)
    else:
        said = names if lora.targets == "all-linear" else list(lora.targets)
        exact = not isinstance(lora.targets, str) or lora.targets == "all-linear"
        exact = exact and sorted(said) == names and _same_in_every_layer(paths)
    return names if exact else sorted(paths)


def _same_in_every_layer(paths: list[str]) -> bool:
    """Whether every module path that is numbered has the same siblings under each number that occurs."""
    layers: dict[str, set[str]] = {}
    for path in paths:
        number_ = re.search(r"\.(\d+)\.", path)
        layers.setdefault(number_[1] if number_ else "", set()).add(path[number_.end() :] if number_ else path)
    return len({frozenset(each) for key, each in layers.items() if key}) <= 1


def read_adapter(folder: str | Path) -> tuple[LoRA, dict[str, tuple[Tensor, Tensor]]]:
    """A PEFT LoRA adapter: its LoRA and, by module path, fp32 A [r, in] and B [out, r] on the CPU.

    Targets and patterns of the LoRA name exactly the modules that the tensors adapt: by short names where
    adapter_config.json does so and all layers are alike, else by full paths. Raises InputError for every field or
    tensor that would need something which minitune does not compute.
    """
    folder = Path(folder)
    where = str(folder / CONFIG)
    if not (folder / TENSORS).exists() and any((folder / f"adapter_model{end}").exists() for end in PICKLES):
        raise InputError(f"{folder}: holds its adapter as a pickle, which can run code and is not read; convert it to "
                         f"{TENSORS} with peft's save_pretrained(…, safe_serialization=True)")  # fmt: skip
    raw = read_json_object(adapter_config(folder))
    _check_fields(where, raw)
    if not (folder / TENSORS).exists():
        raise InputError(f"{folder / TENSORS}: there is no such file; copy it from where {CONFIG} comes")
    with Checkpoint.open_file(folder / TENSORS) as checkpoint:
        tensors = _read_tensors(checkpoint, folder / TENSORS)
    rank, alpha = integer(where, "r", raw.get("r", 8)), number(where, "lora_alpha", raw.get("lora_alpha", 8))
    rank_of, alpha_of = _patterns(where, "rank_pattern", raw), _patterns(where, "alpha_pattern", raw)
    ranks = {path: rank_of.find(path, rank) for path in tensors}
    alphas = {path: alpha_of.find(path, alpha) for path in tensors}
    faults = [
        f"{path}: its tensors have rank {a.shape[0]}, but {CONFIG} says {ranks[path]}"
        for path, (a, _) in tensors.items()
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
        rank_pattern=compress(ranks, rank),
        alpha_pattern=compress(alphas, alpha),
    )
    return lora, tensors


def _check_fields(where: str, raw: dict[str, Any]) -> None:
    only(where, "peft_type", raw.get("peft_type"), ("LORA",))
    for name, value in raw.items():
        rule = FIELDS.get(name)
        if rule is None:
            if not any(same(value, empty) for empty in _EMPTY):
                refuse(where, show(name), value, "this field is not supported, so it must be null, false or empty")
        elif rule.only is not None and not any(same(value, each) for each in rule.only):
            refuse(where, name, value, f"{rule.why}; supported: {', '.join(map(repr, rule.only))}")


def _read_tensors(checkpoint: Checkpoint, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs by module path, after every name, dtype and shape was checked."""
    halves: dict[str, dict[str, str]] = {}
    faults = []
    for name in checkpoint.names():
        info, match = checkpoint.info(name), _NAME.fullmatch(name)
        if match is None:
            faults.append(f"{show(name)} is no LoRA tensor of a linear ({PREFIX}….lora_A.weight or lora_B.weight)")
        elif len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOATS:
            faults.append(f"{show(name)} is {info.dtype} {list(info.shape)}; it must be a float matrix")
        else:
            halves.setdefault(match[1], {})[match[2]] = name
    for module, pair in halves.items():
        if len(pair) < 2:
            faults.append(f"{module} has lora_{next(iter(pair))}, but not the other half")
        elif checkpoint.info(pair["A"]).shape[0] != checkpoint.info(pair["B"]).shape[1]:
            shapes = [list(checkpoint.info(pair[half]).shape) for half in "AB"]
            faults.append(f"{module}: A is {shapes[0]} and B is {shapes[1]}; they must share the rank")
    if faults or not halves:
        raise InputError(f"{path}: {len(faults)} of its tensors cannot be used:{listing(faults or ['it is empty'])}")
    result = {}
    for module, pair in halves.items():
        a, b = (torch.empty(checkpoint.info(pair[half]).shape, dtype=torch.float32) for half in "AB")
        checkpoint.read_into(pair["A"], a)
        checkpoint.read_into(pair["B"], b)
        result[module] = (a, b)
    return result


def _patterns(where: str, name: str, raw: dict[str, Any]) -> Patterns:
    said = mapping(where, name, raw.get(name) or {})
    for key, value in said.items():
        field = f"{name}[{show(key)}]"
        if name == "rank_pattern":
            integer(where, field, value)
        else:
            number(where, field, value)
    return Patterns(f"{where}: {name}", said)


def _targets(where: str, raw: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    said, names = raw.get("target_modules"), sorted({_short(path) for path in paths})
    if isinstance(said, str):
        text(where, "target_modules", said)
        if re.fullmatch(r"\w+", said) and said not in paths:     # other texts are a stranger's regular expressions
            refuse(where, "target_modules", said, 'a text must match whole paths; write a list such as ["q_proj"]')
    elif said is not None:
        texts(where, "target_modules", said)
        narrowed = any(raw.get(name) not in (None, [], "") for name in ("layers_to_transform", "exclude_modules"))
        _check_targets(where, said, paths, narrowed)
        if sorted(set(said)) == names and not narrowed and _same_in_every_layer(paths):
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
        if _short(target) in LINEAR_NAMES and target not in adapted and not narrowed:
            refuse(where, "target_modules", said,
                   f"but {TENSORS} has no tensor of {show(target)}; fetch or copy both files again")


def _ends(path: str) -> list[str]:
    return [path, *(path[dot.end():] for dot in re.finditer(r"\.", path))]


def match_adapter(found: Mapping[str, tuple[Tensor, Tensor]], adapters: Mapping[str, Adapter],
                  folder: Path | None = None, base: Path | None = None) -> None:
    """Copy what ``read_adapter`` found into the network's adapters: each module exactly once, equal shapes.

    Every missing, extra and misshapen tensor counts in ONE InputError, before anything is copied. It names the
    adapter's folder and the base's, where they are given.
    """
    faults = [f"{path} is adapted here, but missing in the file" for path in adapters if path not in found]
    faults += [f"{path} is in the file, but not adapted here" for path in found if path not in adapters]
    for path in found.keys() & adapters.keys():
        for letter, source, out in zip("AB", found[path], (adapters[path].A, adapters[path].B), strict=True):
            if source.shape != out.shape:
                faults.append(f"{path}: {letter} has shape {list(source.shape)}; the network needs {list(out.shape)}")
    if faults:
        raise InputError(f"{folder or 'the adapter'}: does not fit {base or 'the model'}: {len(faults)} faults; "
                         f"{_trained_on(folder)}:{listing(sorted(faults), 4)}")
    with torch.no_grad():
        for path, (a, b) in found.items():
            adapters[path].A.copy_(a)
            adapters[path].B.copy_(b)


def _trained_on(folder: Path | None) -> str:
    """What adapter_config.json says of its base, and the advice that follows."""
    said = None if folder is None else read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return "load the base that it was trained on, or another adapter"
    return f"{CONFIG} says that it was trained on {show(said)}: load that base, or another adapter"
