"""SIGKILL at one of a process's file operations: what lies on the disk then is what a machine that is killed leaves."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""What Python tells an audit hook before it is done; os.replace is a rename."""


def killed(do: Callable[[], object], folder: Path, at: int) -> bool:
    """Call `do` in a process that dies before operation `at` on files: each that is opened in `folder` or synced, each
    change of names. -> whether it died, or had done all before."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    operations, sync = count(), os.fsync

    def operation() -> None:
        if next(operations) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and str(given[0]).startswith(str(folder))):
            operation()

    try:
        torch.set_num_threads(1)        # the parent's threads are not here
        os.fsync = lambda file: (operation(), sync(file))[1]    # of which no hook is told
        sys.addaudithook(heard)
        do()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
