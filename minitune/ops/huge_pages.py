"""huge_pages: ask Linux for large pages under large tensors of a CPU, so that reading them waits less for addresses."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

LEAST = 1 << 21
"""Bytes below which it is not worth asking: a huge page of x86."""


def ask(tensors: Iterable[Tensor]) -> None:
    """Ask for them where nothing was written yet. A product with one row reads each weight once, and with pages of
    4 KiB it waits for their addresses as well.

    Where transparent huge pages are off, or the system is another one, nothing happens. The pages at both ends are
    asked for whole, whoever else lies in them, so that tensors side by side share a huge page where they meet.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes >= LEAST:
            begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, mmap.MADV_HUGEPAGE)
