"""Turn: threads that share a network compute with it one after the other."""

from __future__ import annotations

import threading


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
