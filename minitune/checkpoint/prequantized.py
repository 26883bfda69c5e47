"""prequantized: linears that a checkpoint holds in bitsandbytes' NF4 already, read as they are into NF4Weight.

Such a weight is stored as uint8 [ceil(numel / 2), 1], with companions named after it: ``.absmax`` (fp32, or uint8 where
it is quantised itself), ``.quant_map`` (the 16 levels), ``.nested_absmax`` and ``.nested_quant_map`` where absmax is
quantised, and ``.quant_state.bitsandbytes__nf4``, JSON text in a uint8 tensor. Linears without companions are plain:
a checkpoint may mix both.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.fields import only, refuse
from minitune.checkpoint.files import listing, parse_json
from minitune.checkpoint.reader import Checkpoint
from minitune.devices import DTYPES
from minitune.errors import InputError
from minitune.ops.nf4 import NESTED_BLOCKSIZE, TABLE, NF4Weight, check_blocksize

STATE, FP4 = "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"
PLAIN = ("absmax", "quant_map", STATE)
NESTED = ("nested_absmax", "nested_quant_map")
SUFFIXES = (*PLAIN, *NESTED, FP4)
FIELDS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
MAX_STATE = 4096
"""Bytes of the largest quant_state that is read; bitsandbytes writes about 200."""
_INSTEAD = "download the checkpoint again, or take the unquantised one"


def find(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Every quantised weight of a checkpoint, with the names of its companions. Looks at names and dtypes alone.

    ONE InputError lists what is not whole: companions without their weight or without each other, a uint8 weight
    without companions, a weight that is not packed into uint8, and fp4.
    """
    names = set(checkpoint.names())
    weights = dict.fromkeys(weight for name in checkpoint.names() if (weight := _weight(checkpoint, name)) is not None)
    faults = [fault for weight in weights if (fault := _fault(checkpoint, names, weight)) is not None]
    if faults:
        folder = checkpoint.path(checkpoint.names()[0]).parent
        raise InputError(f"{folder}: {len(faults)} quantised weights cannot be read; {_INSTEAD}:{listing(faults)}")
    return {weight: _companions(names, weight) for weight in weights}


def read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], device: torch.device | str) -> NF4Weight:
    """The quantised weight ``name``, which config.json gives ``shape``, on ``device``, bit for bit as it is stored.

    Bytes go straight to the device, by chunks where it is a GPU. Raises InputError, which names the file, the tensor
    and its value, for whatever is not as bitsandbytes writes it, and for NaN and infinity; all but those is checked
    before a large tensor is read.
    """
    names = set(checkpoint.names())
    fault = _fault(checkpoint, names, name)
    if fault is not None:
        raise InputError(f"{fault}; {_INSTEAD}")
    nested = f"{name}.{NESTED[0]}" in names
    blocksize, dtype, offset = _state(checkpoint, name, shape, nested)
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    _expect(checkpoint, name, torch.uint8, (-(-n // 2), 1))
    _expect(checkpoint, f"{name}.absmax", torch.uint8 if nested else torch.float32, (blocks,))
    _check_levels(checkpoint, f"{name}.quant_map")
    nested_absmax = nested_code = nested_offset = None
    if nested:
        _expect(checkpoint, f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCKSIZE),))
        _expect(checkpoint, f"{name}.nested_quant_map", torch.float32, (256,))
        nested_absmax = checkpoint.read(f"{name}.nested_absmax", device=device)
        nested_code = checkpoint.read(f"{name}.nested_quant_map", device=device)
        nested_offset = torch.tensor(offset, dtype=torch.float32, device=device)
        _check_range(checkpoint, f"{name}.nested_absmax", nested_absmax, nested_code, nested_offset)
    absmax = checkpoint.read(f"{name}.absmax", device=device)
    packed = checkpoint.read(name, device=device).view(-1)
    return NF4Weight(packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, tuple(shape), dtype)


# ---- which tensors belong together ----------------------------------------------------------------------------------
def _weight(checkpoint: Checkpoint, name: str) -> str | None:
    """The quantised weight that a tensor is, or is a companion of; None for a plain tensor."""
    for suffix in SUFFIXES:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}")
    return name if name.endswith(".weight") and checkpoint.info(name).dtype == torch.uint8 else None


def _companions(names: Collection[str], weight: str) -> tuple[str, ...]:
    return tuple(f"{weight}.{suffix}" for suffix in SUFFIXES if f"{weight}.{suffix}" in names)


def _fault(checkpoint: Checkpoint, names: Collection[str], weight: str) -> str | None:
    """What is wrong with the set of tensors of a quantised weight, or None."""
    found = _companions(names, weight)
    if weight not in names:
        if not found:
            return f"the checkpoint has no tensor {short(weight)}"
        return f"{checkpoint.path(found[0])}: tensor {short(found[0])} is there, but not {short(weight)} itself"
    where = f"{checkpoint.path(weight)}: tensor {short(weight)}"
    if f"{weight}.{FP4}" in names:
        return f"{where} is quantised to 'fp4'; only 'nf4' is read"
    dtype = checkpoint.info(weight).dtype
    if dtype != torch.uint8:
        return f"{where} is {dtype}; a quantised weight is read from torch.uint8 only (bnb_4bit_quant_storage)"
    nested = any(f"{weight}.{suffix}" in names for suffix in NESTED)
    missing = [suffix for suffix in (*PLAIN, *(NESTED if nested else ())) if f"{weight}.{suffix}" not in names]
    return f"{where} is torch.uint8, but lacks its companions {', '.join(missing)}" if missing else None


# ---- what they must say ---------------------------------------------------------------------------------------------
def _state(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], nested: bool
) -> tuple[int, torch.dtype, float | None]:
    """(blocksize, dtype, nested_offset) of the checked quant_state."""
    where, state = _json(checkpoint, f"{name}.{STATE}")
    only(where, "quant_type", state.get("quant_type"), ("nf4",))
    expected = (*FIELDS, *(NESTED_FIELDS if nested else ()))
    if state.keys() != set(expected):
        kind = "nested" if nested else "plain"
        raise InputError(
            f"{where}: has the fields {', '.join(map(short, state))}; for a {kind} absmax it needs exactly "
            f"{', '.join(expected)}; {_INSTEAD}"
        )
    try:
        check_blocksize(state["blocksize"])
    except InputError:
        refuse(where, "blocksize", state["blocksize"], f"it must be a power of two from 32 to 4096; {_INSTEAD}")
    only(where, "dtype", state["dtype"], tuple(DTYPES))
    if state["shape"] != list(shape):
        refuse(where, "shape", state["shape"], f"but config.json needs {list(shape)}; the two are not of one model")
    if nested:
        only(where, "nested_blocksize", state["nested_blocksize"], (NESTED_BLOCKSIZE,))
        only(where, "nested_dtype", state["nested_dtype"], ("float32",))
        offset = state["nested_offset"]
        if type(offset) not in (int, float) or abs(offset) > torch.finfo(torch.float32).max:
            refuse(where, "nested_offset", offset, f"it must be a finite float32; {_INSTEAD}")
    return state["blocksize"], DTYPES[state["dtype"]], float(state["nested_offset"]) if nested else None


def _json(checkpoint: Checkpoint, name: str) -> tuple[str, dict[str, Any]]:
    """What the messages call the tensor, and the JSON object that it holds."""
    info, where = checkpoint.info(name), f"{checkpoint.path(name)}: tensor {short(name)}"
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.n_bytes > MAX_STATE:
        raise InputError(
            f"{where} is {info.dtype} {list(info.shape)}; it must hold JSON text of at most {MAX_STATE:,} bytes as "
            f"torch.uint8 [bytes]; {_INSTEAD}"
        )
    raw = bytes(checkpoint.read(name).tolist())
    try:
        state = parse_json(raw, where)
    except InputError as error:
        raise InputError(f"{error}; {_INSTEAD}") from None
    if not isinstance(state, dict):
        raise InputError(f"{where}: must hold a JSON object, but holds {short(state)}; {_INSTEAD}")
    return where, state


def _expect(checkpoint: Checkpoint, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    info = checkpoint.info(name)
    if (info.dtype, info.shape) != (dtype, shape):
        _refuse(checkpoint, name, f"is {info.dtype} {list(info.shape)}; it must be {dtype} {list(shape)}")


def _check_levels(checkpoint: Checkpoint, name: str) -> None:
    """Refuse levels that are not NF4's own, with which every weight is decoded."""
    _expect(checkpoint, name, torch.float32, (len(TABLE),))
    found, levels = checkpoint.read(name), torch.tensor(TABLE, dtype=torch.float32)
    if not torch.equal(found, levels):
        i = int((found != levels).nonzero()[0])
        _refuse(checkpoint, name, f"has {found[i].item()!r} as level {i}; NF4 has {levels[i].item()!r} there")


def _check_range(checkpoint: Checkpoint, name: str, nested_absmax: Tensor, code: Tensor, offset: Tensor) -> None:
    """Refuse finite parts that may decode to an infinite absmax."""
    largest = nested_absmax.abs().max()
    if not bool((code.abs().max() * largest + offset.abs()).isfinite()):
        _refuse(checkpoint, name, f"has magnitudes up to {largest.item():g}; absmax overflows float32 with them")


def _refuse(checkpoint: Checkpoint, name: str, fault: str) -> NoReturn:
    raise InputError(f"{checkpoint.path(name)}: tensor {short(name)} {fault}; {_INSTEAD}")
