"""What a folder is that cannot be read as a model or as an adapter, and what to do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from minitune.arguments import short
from minitune.errors import InputError
from minitune.names import nearest_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MODEL, SINGLE = "config.json", "model.safetensors"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = "minitune.json"
"""Beside an adapter of ours: the SHA-256 of its tensors' file, and what of its training PEFT's files have no field for.
"""
_BASE_FIRST = "it is a PEFT adapter; give its base model here, and this folder as the adapter"
CONVERT = (
    "convert it to safetensors (in a sandbox, with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder))"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_config(folder: Path) -> Path:
    """The folder's config.json. InputError, which says what to do, for a path that is no folder with one."""
    if os.path.lexists(folder / MODEL):
        return folder / MODEL
    if not os.path.lexists(folder):
        name = folder.as_posix()
        fetch = f": hf download {name} --local-dir {folder.name}" if _HUB_NAME.fullmatch(name) else ""
        raise InputError(f"{folder}: there is no such folder{nearest_path(folder)}; a model is read from a local "
                         f"folder and nothing is downloaded, so correct the path, or fetch the model first{fetch}")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the folder that holds it, with {MODEL} and safetensors")
    raise InputError(f"{folder / MODEL}: there is no such file; {_no_config(folder)}")


def adapter_config(folder: Path) -> Path:
    """The folder's adapter_config.json. InputError, which says what to do, for a path that is no folder with one."""
    if os.path.lexists(folder / ADAPTER):
        return folder / ADAPTER
    if not os.path.lexists(folder):
        raise InputError(f"{folder}: there is no such folder{nearest_path(folder)}; give the folder of a PEFT adapter, "
                         f"which holds {ADAPTER}")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the folder that holds it, with {ADAPTER}")
    nested = _below(folder, ADAPTER)
    if nested:
        advice = f"did you mean {nested}?"
    elif (folder / MODEL).exists() and (folder / "environment.json").exists():
        advice = "it is the folder of a run that kept no adapter"
    elif (folder / MODEL).exists():
        advice = "the folder holds a model, not an adapter; give it as the base"
    else:
        advice = "give the folder that `minitune train` wrote as …/adapter, or peft's save_pretrained"
    raise InputError(f"{folder / ADAPTER}: there is no such file; {advice}")


def no_weights(folder: Path) -> str:
    """What a model folder without safetensors of the known names holds instead, and what to do."""
    names = sorted(os.listdir(folder))
    others = [name for name in names if name.endswith(".safetensors") and name != WEIGHTS]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if WEIGHTS in names:
        return _BASE_FIRST
    if others:
        return f"it has {short(others)}; fetch what is missing, or call a whole model's file {SINGLE}"
    if pickles:
        return f"its weights are pickles ({short(pickles)}), which can run code and are not read; {CONVERT}"
    return _gguf(names) or f"fetch the weights into the folder, {SINGLE} or all shards with their index"


def _no_config(folder: Path) -> str:
    names, nested = sorted(os.listdir(folder)), _below(folder, MODEL)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if ADAPTER in names:
        return _BASE_FIRST
    if nested:
        return f"did you mean {nested}?"
    if pickles and not any(name.endswith(".safetensors") for name in names):
        return f"fetch the model again in safetensors; pickles ({short(pickles)}) can run code and are not read"
    return _gguf(names) or "fetch it into the folder from where the weights come"


def _gguf(names: list[str]) -> str | None:
    found = [name for name in names if name.lower().endswith(".gguf")]
    return f"GGUF ({short(found)}) is not read; fetch the same model in safetensors" if found else None


def _below(folder: Path, name: str) -> str:
    """The folders within that hold the file, the latest three: a run's adapter/, and the Hub's cache as it lies."""
    found = sorted(path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/{name}"))
    return " or ".join(map(str, found[-3:]))
