"""Ctrl-C, SIGTERM, SIGHUP: held back while statements that belong together are done; all of them an end like Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What a cluster sends some seconds before it takes the machine back, and a terminal that is closed."""

SAME = 1.0
"""Seconds in which a second signal is the same wish: systemd can send SIGTERM and SIGHUP at once, and a program around
this one hands on the Ctrl-C that a terminal sends to both."""


class Terminated(KeyboardInterrupt):
    """One of ENDING came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Within it Ctrl-C, and those of ENDING that somebody handles, do nothing; what they do as a rule is done at the
    end. So weights and moments that have moved half a step are never taken for the state of a run, and nothing is half
    saved. In another thread than the main one it does nothing: Python tells of signals in the main thread alone."""
    usual: dict[int, Handler] = {}
    held: list[tuple[int, FrameType | None]] = []
    try:
        _handle(usual, lambda number, frame: held.append((number, frame)))
        yield
    finally:
        _put_back(usual, lambda: _all([functools.partial(usual[number], number, frame) for number, frame in held]))


@contextlib.contextmanager
def one_end() -> Iterator[None]:
    """Within it a signal that comes less than SAME seconds after one that raised an exception does nothing: it would
    break off what is done about the first before `unbroken` could hold it back. What `unbroken` says of handlers and of
    threads holds here too."""
    usual: dict[int, Handler] = {}
    raised = -SAME

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if time.monotonic() - raised < SAME:
            return
        try:
            usual[number](number, frame)
        except BaseException:
            raised = time.monotonic()
            raise

    try:
        _handle(usual, once)
        yield
    finally:
        _put_back(usual)


def _handle(usual: dict[int, Handler], handler: Handler) -> None:
    """Have `handler` called for Ctrl-C and those of ENDING that somebody handles; what did so goes into `usual`."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ENDING):
            before = signal.getsignal(number)
            if callable(before):
                usual[number] = before
                signal.signal(number, handler)


def _put_back(usual: dict[int, Handler], *then: Callable[[], object]) -> None:
    _all([*(functools.partial(signal.signal, number, handler) for number, handler in usual.items()), *then])


def _all(calls: Sequence[Callable[[], object]]) -> None:
    """Makes every call, whatever one of them or a signal between them raises."""
    if calls:
        try:
            calls[0]()
        finally:
            _all(calls[1:])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it ENDING raise `Terminated`, so that a run ends as after Ctrl-C; but for those that are ignored (nohup)
    or have a handler of the program's own, and not in another thread than the main one."""
    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    main = threading.current_thread() is threading.main_thread()
    free = [number for number in ENDING if main and signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in free:
            signal.signal(number, end)
        yield
    finally:
        _all([functools.partial(signal.signal, number, signal.SIG_DFL) for number in free])
