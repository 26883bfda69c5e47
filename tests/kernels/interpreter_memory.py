"""Triton's interpreter as a memory checker: what it runs in order, a GPU does at once.

It runs a launch's programs one after another, and each tile as a whole; so it may be right where a GPU is not. With
`install` these are errors:

- a read or a write beside the elements of the tensors that the launch was given;
- a value that one program writes and another reads or writes;
- a value that a program writes and then reads, or that it writes from another place of a tile than it read it into or
  wrote it from before: that is another thread, which nobody waits for but at a `tl.debug_barrier`, or where several
  warps reduce a tile to one value.

Not seen is where one warp reduces a tile, and the others do not wait: the tiles here are small, and how many warps
would share a real one is not known. An atomic operation is an error too: no kernel has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2
LARGE = 1 << 26
"""Bytes; of a larger storage, which may lie there with few pages behind it, only the bounds are checked."""
INDIRECT = ("lora_images_refresh",)
"""Kernels that find tensors by addresses in a table, which the launch does not show."""


class Place:
    """Who touched each byte of one storage in a launch. A position is one in a tile, and tells tiles of different
    shapes apart."""

    def __init__(self, storage: torch.UntypedStorage):
        n = storage.nbytes()
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + n
        self.is_large = n > LARGE
        n = 0 if self.is_large else n
        self.given = torch.zeros(n, dtype=torch.bool)
        self.reader, self.writer = np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32)
        self.read_at, self.written_at = np.full(n, NOBODY, np.int64), np.full(n, NOBODY, np.int64)
        self.read_in, self.written_in = np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32)

    def give(self, tensor: torch.Tensor) -> None:
        if self.is_large:
            return
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        self.given.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)


class Launch:
    """The accesses of one launch, checked as they come."""

    def __init__(self, name: str, tensors: list[torch.Tensor]):
        self.name, self.program, self.epoch = name, NOBODY, 0
        places: dict[int, Place] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            places.setdefault(storage.data_ptr(), Place(storage)).give(tensor)
        self.places = list(places.values())
        self.shapes: dict[tuple[int, ...], int] = {}

    def next_program(self, program: int) -> None:
        self.program = program
        self.epoch += 1

    def found(self, pointers: Any, mask: Any) -> tuple[Place | None, np.ndarray, np.ndarray]:
        """The storage, and for each live value of the tile its byte there and its position."""
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        position = np.flatnonzero(live) + (self.shapes.setdefault(live.shape, len(self.shapes)) << 32)
        addresses = addresses[live].astype(np.int64)
        if not len(addresses):
            return None, addresses, position
        first, last = int(addresses.min()), int(addresses.max())
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for place in self.places:
            if place.begin <= first and last + size <= place.end:
                if place.is_large:
                    return None, addresses, position
                at = addresses - place.begin
                given = place.given.numpy()
                self.check(~(given[at] & given[at + size - 1]), "touches what lies beside its tensors' elements")
                return place, at, position
        if self.name not in INDIRECT:
            raise AssertionError(f"{self.name}: program {self.program} touches what is none of its tensors")
        return None, addresses, position

    def check(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise AssertionError(f"{self.name}: program {self.program} {what} ({int(wrong.sum())} of {wrong.size})")

    def read(self, pointers: Any, mask: Any) -> None:
        place, at, position = self.found(pointers, mask)
        if place is None:
            return
        writer, reader = place.writer[at], place.reader[at]
        self.check((writer != NOBODY) & (writer != self.program), "reads what another program wrote")
        self.check(place.written_in[at] == self.epoch, "reads what it has just written")
        place.reader[at] = np.where((reader == NOBODY) | (reader == self.program), self.program, SEVERAL)
        again = (place.read_in[at] == self.epoch) & (place.read_at[at] != position)
        place.read_at[at], place.read_in[at] = np.where(again, SEVERAL, position), self.epoch
        place.read_at[at[place.read_at[at] != position]] = SEVERAL      # read twice in one tile, too

    def write(self, pointers: Any, mask: Any) -> None:
        place, at, position = self.found(pointers, mask)
        if place is None:
            return
        writer, reader = place.writer[at], place.reader[at]
        self.check((writer != NOBODY) & (writer != self.program), "writes what another program wrote")
        self.check((reader != NOBODY) & (reader != self.program), "writes what another program read")
        self.check((place.read_in[at] == self.epoch) & (place.read_at[at] != position),
                   "writes what it read at another place of a tile")
        self.check((place.written_in[at] == self.epoch) & (place.written_at[at] != position),
                   "writes twice, from two places of a tile")
        place.writer[at], place.written_at[at], place.written_in[at] = self.program, position, self.epoch
        self.check(place.written_at[at] != position, "writes a value twice in one tile")


_launch: Launch | None = None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _wrapped(owner: type, name: str, before: Callable[..., None]) -> None:
    stock = getattr(owner, name)

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        before(self, *arguments, **named)
        return stock(self, *arguments, **named)

    setattr(owner, name, method)


def _begin(executor: Any, arguments: Any, named: Any) -> None:
    global _launch
    _launch = Launch(executor.fn.__name__, list(_tensors(itertools.chain(arguments, named.values()))))


def _program(builder: Any, x: int, y: int, z: int) -> None:
    if _launch is not None:
        _launch.next_program((x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z)


def _read(builder: Any, pointers: Any, mask: Any, *_: Any) -> None:
    assert _launch is not None
    _launch.read(pointers, mask)


def _write(builder: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
    assert _launch is not None
    _launch.write(pointers, mask)


def _barrier(builder: Any) -> None:
    assert _launch is not None
    _launch.epoch += 1


def _reduce(reduction: Any, given: Any) -> None:
    value = given[0] if isinstance(given, tuple) else given
    if len(value.shape) < 2 or reduction.axis is None:
        _barrier(reduction)


def _atomic(*_: Any) -> None:
    raise AssertionError("an atomic operation: its order is another in each run, and it is not watched here")


def install() -> None:
    """Once a process, before a kernel runs."""
    builder = interpreter.InterpreterBuilder
    _wrapped(interpreter.GridExecutor, "_init_args_hst", _begin)
    _wrapped(builder, "set_grid_idx", _program)
    _wrapped(builder, "create_masked_load", _read)
    _wrapped(builder, "create_masked_store", _write)
    _wrapped(builder, "create_barrier", _barrier)
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        _wrapped(builder, name, _atomic)
    _wrapped(interpreter.ReduceOps, "apply", _reduce)
