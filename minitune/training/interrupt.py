"""unbroken: Ctrl-C waits until a few statements that belong together are done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Within it Ctrl-C does nothing; what it does as a rule it does at the end. So weights and moments that have moved
    half a step are never taken for the state of a run. In another thread than the main one it does nothing: Python
    tells of Ctrl-C in the main thread alone."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            usual(*held[0])
