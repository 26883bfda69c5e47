"""tuned: which way of an op was measured to be the fastest at a shape on this GPU; `minitune tune` writes it down.

The table is a JSON file, {"device", "torch", "ops": {op: [{"shape": […], "ms": {way: …}}, …]}}, in the user's cache
folder, or where MINITUNE_TUNED says. Without it every op takes its library's way. The last number of a shape is
the one that changes from batch to batch (tokens, the longest document): the nearest measured one counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minitune.errors import InputError

Shape = tuple[int, ...]
Table = dict[str, dict[Shape, dict[str, float]]]
"""op -> shape -> way -> milliseconds."""


EXACT = ("cudnn",)
"""Ways that count at measured shapes alone: for every other one the library would first make a plan."""
_forced: dict[str, str] = {}


@contextlib.contextmanager
def forced(**ways: str) -> Iterator[None]:
    """Within it these ops take these ways at every shape; a step's name takes _ for its blank (lora_matmul_input)."""
    before = dict(_forced)
    _forced.update(ways)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def way(op: str, shape: Shape, device: torch.device, dtype: torch.dtype, quantized: bool = False,
        without: tuple[str, ...] = ()) -> str | None:
    """The fastest way of `op` at `shape` on `device`, or None where nothing was measured. quantized: its weight lies in
    NF4 and is decoded for each product, which was measured for itself. without: ways that cannot be taken."""
    if _forced and op.replace(" ", "_") in _forced:
        told = _forced[op.replace(" ", "_")]
        return None if told in without else told
    if device.type != "cuda":
        return None
    return _nearest(name_of(op, dtype, quantized), shape, _indexed(device), without)


def ways(op: str, start: Shape, device: torch.device, dtype: torch.dtype, quantized: bool = False) -> set[str]:
    """The fastest ways of `op` at all measured shapes that begin with `start`."""
    if _forced and op.replace(" ", "_") in _forced:
        return {_forced[op.replace(" ", "_")]}
    if device.type != "cuda":
        return set()
    found = table(_indexed(device)).get(name_of(op, dtype, quantized), {})
    return {_fastest(ms) for shape, ms in found.items() if shape[: len(start)] == start}


def name_of(op: str, dtype: torch.dtype, quantized: bool = False) -> str:
    """The op's name in the table: each dtype is measured for itself, and so are weights in NF4."""
    return f"{op} {str(dtype).removeprefix('torch.')}{' nf4' * quantized}"


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, shape: Shape, device: torch.device, without: tuple[str, ...]) -> str | None:
    measured = {known: {way: time for way, time in ms.items()
                        if way not in without and (known == shape or way not in EXACT)}
                for known, ms in table(device).get(op, {}).items()}
    near = [known for known, ms in measured.items() if ms and known[:-1] == shape[:-1]]
    if not near:
        return None
    return _fastest(measured[min(near, key=lambda known: abs(math.log(known[-1] / max(1, shape[-1]))))])


def _fastest(ms: Mapping[str, float]) -> str:
    return min(ms, key=lambda name: ms[name])


@functools.lru_cache(maxsize=16)
def table(device: torch.device) -> Table:
    """What was measured on this kind of GPU with this torch; empty if nothing was."""
    path = place(torch.cuda.get_device_name(device))
    return read(path) if path.exists() else {}


def place(device_name: str) -> Path:
    """Where the table of this kind of GPU lies: one for each torch, since a new one may turn the tables."""
    told = os.environ.get("MINITUNE_TUNED")
    if told:
        return Path(told)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device_name} torch {torch.__version__}")
    return cache / "minitune" / f"tuned-{name}.json"


def read(path: Path) -> Table:
    """InputError for a file that is no such table."""
    try:
        ops = json.loads(path.read_text())["ops"]
        return {str(op): {_shape(entry["shape"]): {str(k): _positive(v) for k, v in entry["ms"].items()}
                          for entry in entries if entry["ms"]} for op, entries in ops.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no table of `minitune tune` ({type(error).__name__}: {error}); remove it, or "
                         "run `minitune tune` again") from None


def _shape(value: Sequence[Any]) -> Shape:
    if not value or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(f"shape is {value!r}")
    return tuple(value)


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"a time is {value!r}")
    return number


def write(path: Path, device_name: str, measured: Table) -> None:
    """Add what was measured to the table at `path`; the same shapes are replaced."""
    whole = read(path) if path.exists() else {}
    for op, shapes in measured.items():
        whole[op] = whole.get(op, {}) | shapes
    ops = {op: [{"shape": list(shape), "ms": ms} for shape, ms in sorted(shapes.items())]
           for op, shapes in sorted(whole.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"device": device_name, "torch": str(torch.__version__), "ops": ops}, indent=1)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text + "\n")
    partial.replace(path)
    forget()


def forget() -> None:
    """Read the table anew at the next question."""
    table.cache_clear()
    _nearest.cache_clear()
