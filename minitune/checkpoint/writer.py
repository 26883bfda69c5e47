"""Writing one safetensors file as a stream: no second copy of the tensors, on any device."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minitune.checkpoint.reader import CHUNK
from minitune.checkpoint.safetensors_header import DTYPES
from minitune.errors import InputError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}
"""What transformers and peft expect in a file of PyTorch tensors."""


class LazyTensor(NamedTuple):
    """A tensor that is made when its turn to be written comes, so that no two need be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def detach(self) -> Tensor:
        """The tensor itself."""
        made = self.make()
        assert tuple(made.shape) == self.shape and made.dtype == self.dtype
        return made.detach()


class Writable(Protocol):
    """A binary file, as far as it is written to."""

    def write(self, data: Any, /) -> int: ...


class Summed:
    """A file to write to that keeps the SHA-256 of what it is given."""

    def __init__(self, file: Writable) -> None:
        self._file, self._sum = file, hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self._sum.update(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._sum.hexdigest()


def write_safetensors(file: Writable, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
    """Write ``tensors`` with the metadata {"format": "pt"}; takes at most 16 MiB beside them (and a lazy one).

    Wide dtypes come first, so that every tensor is aligned to its element. Raises InputError for a dtype that the
    format does not have; an OSError of the file goes through.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": METADATA}
    place = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise InputError(f"tensor {name}: {tensor.dtype} cannot be written to safetensors")
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        _write_tensor(file, tensors[name].detach())


def _write_tensor(file: Writable, tensor: Tensor) -> None:
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor
    most = CHUNK // tensor.element_size() // max(1, rows[:1].numel())
    for piece in rows.split(max(1, most)):
        plain = piece.cpu().contiguous()
        n_bytes = plain.numel() * plain.element_size()
        if n_bytes:
            file.write((ctypes.c_char * n_bytes).from_address(plain.data_ptr()))
