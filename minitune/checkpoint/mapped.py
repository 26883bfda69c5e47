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

HUGE_PAGE = 2 << 20
_FAILED, _MAP_FIXED, _MADV_POPULATE_READ = ctypes.c_void_p(-1).value, 0x10, 22      # of Linux's headers
_ACCESS = mmap.PROT_READ | mmap.PROT_WRITE


def map_bytes(file: FileIO, begin: int, end: int) -> Tensor | None:
    """uint8 [end - begin] over these bytes of an open file, which may then be closed; None where it cannot be had.

    The mapping is private: what is written into the tensor reaches no file. It lasts as long as a tensor that shares
    its memory. Where Linux can (5.14), all of it is read before this returns. Later on a file that is replaced by
    another of its name stays readable here, one that is overwritten in place changes the tensor, and one that is cut
    off, or whose disk is gone, ends the process ("Bus error"), as with every reader that maps files.
    """
    system = _system()
    if system is None or os.fstat(file.fileno()).st_size < end:
        return None
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    length = end - begin + ahead
    # Not Python's mmap: that one keeps a file descriptor for each mapping, and a model has hundreds of tensors.
    reserved = length + HUGE_PAGE + mmap.PAGESIZE
    base = system.mmap(None, reserved, _ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _FAILED:
        return None
    address = base + (begin - ahead - base) % HUGE_PAGE
    if not _map_there(system, file.fileno(), begin - ahead, length, address):
        system.munmap(base, reserved)
        return None
    memory = (ctypes.c_char * length).from_address(address)
    weakref.finalize(memory, system.munmap, base, reserved).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=ahead)


def _map_there(system: Any, descriptor: int, begin: int, length: int, address: int) -> bool:
    """Whether these bytes of the file could be mapped and read at the address, within what is reserved. Addresses and
    bytes agree modulo a huge page, so that the file cache's huge pages may be huge here too; and a page of zeros lies
    behind, for a library's product may look a few values beyond its operand."""
    if system.mmap(address, length, _ACCESS, mmap.MAP_PRIVATE | _MAP_FIXED, descriptor, begin) == _FAILED:
        return False
    system.madvise(address, length, mmap.MADV_HUGEPAGE)     # a wish: what comes from the disk, in large pieces
    # Here an error of the disk is an error, and no signal. Linux before 5.14 does not know it.
    return system.madvise(address, length, _MADV_POPULATE_READ) == 0 or ctypes.get_errno() == errno.EINVAL


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
