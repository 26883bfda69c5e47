"""mapped: bytes of a file as a tensor, read where the system's file cache has them instead of from a copy."""

from __future__ import annotations

import ctypes
import errno
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

_FAILED, _MAP_FIXED, _MADV_POPULATE_READ = ctypes.c_void_p(-1).value, 0x10, 22      # of Linux's headers


def map_bytes(file: FileIO, begin: int, end: int) -> Tensor | None:
    """uint8 [end - begin] over these bytes of an open file, which may then be closed; None where it cannot be had.

    The mapping is private: what is written into the tensor reaches no file. It lasts as long as a tensor that shares
    its memory. All of it is read once before this returns. Later on a file that is replaced by another of its name
    stays readable here, one that is overwritten in place changes the tensor, and one that is cut off, or whose disk is
    gone, ends the process ("Bus error"), as with every reader that maps files.
    """
    system = _system()
    if system is None or os.fstat(file.fileno()).st_size < end:
        return None
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    length = end - begin + ahead
    # Not Python's mmap: that one keeps a file descriptor for each mapping, and a model has hundreds of tensors.
    address = _mapped(system, file.fileno(), begin - ahead, length)
    if address is None:
        return None
    memory = (ctypes.c_char * length).from_address(address)
    weakref.finalize(memory, system.munmap, address, length + _room(length)).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=ahead)


def _mapped(system: Any, descriptor: int, begin: int, length: int) -> int | None:
    """The address of these bytes of a file, read; None where the system maps or reads them not. A page of zeros lies
    behind them, for a library's product may look a few values beyond its operand."""
    access, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    whole = length + _room(length)
    address = system.mmap(None, whole, access, private | mmap.MAP_ANONYMOUS, -1, 0)
    if address == _FAILED:
        return None
    there = system.mmap(address, length, access, private | _MAP_FIXED, descriptor, begin) != _FAILED
    if there:
        system.madvise(address, length, mmap.MADV_HUGEPAGE)     # a wish: what comes from the disk, in large pieces
        # Here an error of the disk is an error, and no signal. Linux before 5.14 does not know it.
        there = system.madvise(address, length, _MADV_POPULATE_READ) == 0 or ctypes.get_errno() == errno.EINVAL
    if not there:
        system.munmap(address, whole)
    return address if there else None


def _room(length: int) -> int:
    """Bytes up to the next whole page, and one page."""
    return -length % mmap.PAGESIZE + mmap.PAGESIZE


@functools.cache
def _system() -> Any:
    """The C library of a 64-bit Linux; else None."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    system.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    system.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return system
