"""Turn: threads that share a network compute with it one after the other; no compiler looks into what they do there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Turn:
    """Held while the network computes, since that lays out images of its adapters, and weights for generation, in
    places of its own. A thread that has its turn may take it again. A copy of the network has a turn of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def in_turn(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Of a method of an object with a ``turn``: it computes when it has that. A program around it that is compiled runs
    it as it is: its hand-written halves are what a compiler would make of them, and keep state that none can follow."""

    @functools.wraps(method)
    def run(network: Any, *values: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():       # and only then: it imports the compiler
            untraced: R = torch.compiler.disable(run)(network, *values, **named)
            return untraced
        with network.turn:
            return method(network, *values, **named)

    return run
