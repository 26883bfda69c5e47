"""mapped: bytes of a file as a tensor, read where the system's file cache has them instead of from a copy."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from io import FileIO
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 20
"""Bytes from which on it is worth a mapping: what is smaller had better be copied to an address that is a multiple of
64."""


def map_bytes(file: FileIO, begin: int, end: int) -> Tensor | None:
    """uint8 [end - begin] over these bytes of an open file, which may then be closed; None where it cannot be had.

    The mapping is private: what is written into the tensor reaches no file. It lasts as long as a tensor that shares
    its memory. A file that is replaced by another of its name stays readable here, one that is overwritten in place
    changes the tensor, and one that is cut off ends the process (SIGBUS), as with every reader that maps files.
    """
    system = _system()
    if system is None or os.fstat(file.fileno()).st_size < end:
        return None
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    length = end - begin + ahead
    # Not Python's mmap: that one keeps a file descriptor for each mapping, and a model has hundreds of tensors.
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    address = system.mmap(None, length, writable, mmap.MAP_PRIVATE, file.fileno(), begin - ahead)
    if address == ctypes.c_void_p(-1).value:
        return None
    system.madvise(address, length, mmap.MADV_HUGEPAGE)     # a wish: what is read from the disk now, in large pieces
    memory = (ctypes.c_char * length).from_address(address)
    weakref.finalize(memory, system.munmap, address, length).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=ahead)


@functools.cache
def _system() -> Any:
    """The C library of a 64-bit Linux; else None."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    system = ctypes.CDLL(None)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    system.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    system.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return system
