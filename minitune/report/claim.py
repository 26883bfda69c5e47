"""claimed: a run's folder belongs to one process as long as that trains the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None            # type: ignore[assignment]

from minitune.errors import InputError


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing, and locks it where the file system has locks. InputError where another
    process, or another call in this one, holds it. What was made, and is empty at the end, goes again."""
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY) if fcntl is not None and folder.is_dir() else None
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    try:
        if held is not None:
            _lock(held, folder)
        yield
    finally:
        if held is not None:
            with contextlib.suppress(OSError):      # else a process that was forked meanwhile would go on holding it
                fcntl.flock(held, fcntl.LOCK_UN)
            os.close(held)
        for each in made:
            with contextlib.suppress(OSError):      # it holds something
                each.rmdir()


def _lock(held: int, folder: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process trains this run; wait for it, or end it") from None
    except OSError:
        return          # no locks here, as on some network file systems
