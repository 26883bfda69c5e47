"""A strict parser of the safetensors header: which tensors a file holds, and at which bytes.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length N as a little-endian
unsigned integer; N bytes of UTF-8 JSON that start with ``{`` and may end in spaces; then the tensors' bytes, without
holes. safetensors 0.8 accepts duplicate names, leading white space and extra fields; this parser does not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from minitune.arguments import short
from minitune.checkpoint.files import open_regular, parse_json, refuse_pointer
from minitune.errors import InputError

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
MAX_RANK = 64
MAX_BYTES = 2**63 - 1
AGAIN = "fetch the file again"

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""The format's dtypes that torch has with a whole number of bytes per element."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands: ``begin`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What one file holds; ``tensors`` in the order of their bytes."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The checked header of a safetensors file. Raises InputError, which names the file, for anything out of order.

    Reads the header only: time and memory are bounded by its length, at most 100,000,000 bytes and 10^6 JSON values.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = _read(file, 8, path)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            refuse_pointer(path, start + file.read(56))
            raise InputError(f"{path}: its header claims {length:,} bytes; the format allows {MAX_HEADER:,}; is it "
                             f"safetensors? If so, {AGAIN}")
        if 8 + length > size:
            raise InputError(f"{path}: its header claims {length:,} bytes, but the file has {size:,}; it is truncated: "
                             f"{AGAIN}")
        raw = _read(file, length, path)
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: its header must start with '{{', but starts with {raw[:8]!r}; is it safetensors? "
                         f"If so, {AGAIN}")
    entries = parse_json(raw.rstrip(b" "), f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map names to strings, but is {short(metadata)}")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    place = 8 + length
    for info in tensors:
        if info.begin != place:
            hole = info.begin - place
            fault = "overlaps the one before it" if hole < 0 else f"leaves a hole of {hole:,} bytes before it"
            raise InputError(f"{path}: tensor {short(info.name)} {fault}; {AGAIN}")
        place = info.end
    if place != size:
        fault = f"{size - place:,} bytes follow the last tensor" if place < size else "it is truncated"
        raise InputError(f"{path}: the tensors end at byte {place:,}, but the file has {size:,}: {fault}; {AGAIN}")
    return Header(path, {info.name: info for info in tensors}, metadata)


def _read(file: FileIO, length: int, path: Path) -> bytes:
    raw = file.read(length)  # unbuffered: one system call, one copy
    if len(raw) != length:
        raise InputError(f"{path}: ends after {file.tell():,} bytes, within its header; it is truncated: {AGAIN}")
    return raw


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_BYTES  # type(): True is an int, too


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    where = f"{path}: tensor {short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = list(entry) if isinstance(entry, dict) else entry
        raise InputError(f"{where}: needs exactly dtype, shape and data_offsets, but has {short(found)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{where}: its dtype is {short(entry['dtype'])}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_whole, shape)):
        raise InputError(f"{where}: its shape is {short(shape)}; allowed are up to {MAX_RANK} integers of 0 to 2^63-1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)) or offsets[0] > offsets[1]:
        raise InputError(f"{where}: its data_offsets are {short(offsets)}; they must be [begin, end] with begin ≤ end")
    extent = dtype.itemsize
    for size in shape:
        extent *= max(size, 1)  # a zero must not hide sizes whose strides overflow
        if extent > MAX_BYTES:
            raise InputError(f"{where}: its shape {short(shape)} overflows")
    n_bytes = 0 if 0 in shape else extent
    if n_bytes != offsets[1] - offsets[0]:
        raise InputError(
            f"{where}: shape {short(shape)} of {entry['dtype']} takes {n_bytes:,} bytes, but data_offsets "
            f"{short(offsets)} span {offsets[1] - offsets[0]:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])
