"""Ctrl-C and SIGTERM: held back while statements that belong together are done; SIGTERM as an end like Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which a cluster sends some seconds before it takes the machine back."""

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Within it Ctrl-C and a SIGTERM that somebody handles do nothing; what they do as a rule is done at the end. So
    weights and moments that have moved half a step are never taken for the state of a run, and nothing is half saved.
    In another thread than the main one it does nothing: Python tells of signals in the main thread alone."""
    usual: dict[int, Callable[[int, FrameType | None], object]] = {}
    held: list[tuple[int, FrameType | None]] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    usual[number] = handler
                    signal.signal(number, lambda number, frame: held.append((number, frame)))
        yield
    finally:
        _all([*(functools.partial(signal.signal, number, handler) for number, handler in usual.items()),
              lambda: _all([functools.partial(usual[number], number, frame) for number, frame in held])])


def _all(calls: Sequence[Callable[[], object]]) -> None:
    """Makes every call, whatever one of them or a signal between them raises."""
    if calls:
        try:
            calls[0]()
        finally:
            _all(calls[1:])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, so that a run ends as after Ctrl-C. Nothing changes where the program has
    a handler of its own, or in another thread than the main one."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
