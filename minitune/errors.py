"""The one exception for bad input: the command line prints it without a traceback and exits with code 2. And how to
know, of all others, those that say that memory ran out."""

import re

_HOST = re.compile(r"tried to allocate (\d+) bytes")
"""torch's allocator of host memory raises a RuntimeError that says this."""
_OTHERS = re.compile(r"could not (create|execute) a primitive$|could not create a memory( object)?$|std::bad_alloc$"
                     r"|CUDA error: out of memory|\[CUDA\]: out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.MULTILINE)
"""And so do oneDNN, which multiplies bfloat16 on a CPU, C++, the driver of a GPU, Triton and cuBLAS."""


class InputError(Exception):
    """Something the user gave is wrong. The message names the file, the line or field, the value, and what to do."""


class NotSaved(InputError):
    """What a run has to write, on its way or at its end, cannot be written: exit code 1."""


def out_of_memory(error: BaseException) -> str | None:
    """What to tell of an error that says that the memory of the host, or of a GPU, ran out; None for any other."""
    if isinstance(error, RuntimeError):
        if asked := _HOST.search(str(error)):
            return f"out of memory: {int(asked[1]) / 1e9:,.1f} GB more are needed"
        if said := _OTHERS.search(str(error)):
            return f"out of memory ({said[0]})"
    # By name: this module loads no torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return str(error) or "out of memory"
    return None
