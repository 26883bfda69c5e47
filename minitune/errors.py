"""The one exception for bad input: the command line prints it without a traceback and exits with code 2. And how to
know, of all others, those that say that memory ran out."""

import re

_HOST = re.compile(r"tried to allocate (\d+) bytes")
"""torch's allocator of host memory raises a RuntimeError that says this."""


class InputError(Exception):
    """Something the user gave is wrong. The message names the file, the line or field, the value, and what to do."""


class NotSaved(InputError):
    """A run came to its end, and what it trained cannot be written: exit code 1."""


def out_of_memory(error: BaseException) -> str | None:
    """What to tell of an error that says that the memory of the host, or of a GPU, ran out; None for any other."""
    asked = _HOST.search(str(error)) if isinstance(error, RuntimeError) else None
    if asked:
        return f"out of memory: {int(asked[1]) / 1e9:,.1f} GB more are needed"
    # By name: this module loads no torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return str(error) or "out of memory"
    return None
