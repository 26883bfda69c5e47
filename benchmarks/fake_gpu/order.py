"""order: memory that work on two streams of a GPU touches, while nothing says which of them comes first.

Each stream, and the host, has a vector clock (Mattern 1989): how far it has waited for each of the others. What the
host does or learns comes before what it puts in line later. Two accesses to a storage, one of them a write, must be
ordered; and memory is given back to the stream that was current when it was taken, which may hand it out again at once:
others that have touched it must have been waited for by then. (`record_stream`, another way to say so, is not known
here, nor is memory that a kernel finds through a table of addresses.)
"""

from __future__ import annotations

import ast
import contextlib
import functools
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HOST = -1
Clock = dict[int, int]
"""Of each stream, by its number: how many of its pieces of work are known to be done before what comes next."""


@dataclass
class Touched:
    """Of one storage: the stream that it belongs to, its last write and the reads since, each as (stream, its time)."""

    owner: int
    name: str
    write: tuple[int, int] | None = None
    reads: dict[int, int] = field(default_factory=dict)


class Order:
    """The clocks, and who touched what. `races` says what was found."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {HOST: {}, 0: {}}
        self.current = 0
        self.memory: dict[int, Touched] = {}
        self.races = Counter[str]()

    def stream(self) -> int:
        """A new one's number."""
        self.clocks[len(self.clocks) - 1] = {}
        return len(self.clocks) - 2

    def wait(self, who: int, clock: Clock) -> None:
        """From here on `who` comes behind all that `clock` knows."""
        own = self.clocks[who]
        for stream, time in clock.items():
            own[stream] = max(own.get(stream, 0), time)

    def taken(self, key: int, name: str) -> None:
        self.memory[key] = Touched(self.current, name)

    def work(self, name: str, reads: set[int], writes: set[int], who: int | None = None) -> None:
        """A piece of work, on the current stream unless `who` says otherwise, that touches these storages."""
        stream = self.current if who is None else who
        self.wait(stream, self.clocks[HOST])
        clock = self.clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        for key in reads | writes:
            touched = self.memory.setdefault(key, Touched(HOST, "memory of the host"))
            self._check(touched, touched.write, stream, f"{name} touches what")
            if key in writes:
                for read in touched.reads.items():
                    self._check(touched, read, stream, f"{name} writes what")
                touched.write, touched.reads = (stream, clock[stream]), {}
            else:
                touched.reads[stream] = clock[stream]

    def gone(self, key: int) -> None:
        """Nobody holds the storage any more."""
        touched = self.memory.pop(key, None)
        if touched is None or touched.owner == HOST:
            return      # torch keeps pinned memory until the copies are done
        self.wait(touched.owner, self.clocks[HOST])
        for access in [touched.write, *touched.reads.items()]:
            self._check(touched, access, touched.owner, "given back is what")

    def _check(self, touched: Touched, access: tuple[int, int] | None, stream: int, what: str) -> None:
        if access is not None and access[0] != stream and self.clocks[stream].get(access[0], 0) < access[1]:
            self.races[f"{what} {_said(access[0])} may still have in hand: {touched.name}"] += 1


def _said(stream: int) -> str:
    return "the host" if stream == HOST else f"stream {stream}"


order = Order()
"""Of the fake GPU that is in use, one at a time."""


def begin() -> Order:
    """A new one, for a new GPU."""
    global order
    order = Order()
    return order


class Stream:
    """Of torch.cuda."""

    def __init__(self, *_: Any, number: int | None = None):
        self.order = order
        self.cuda_stream = self.number = order.stream() if number is None else number

    def wait_stream(self, other: Stream) -> None:
        self.order.wait(self.number, self.order.clocks[other.number])

    def wait_event(self, event: Event) -> None:
        self.order.wait(self.number, event.clock)


class Event:
    """Of torch.cuda."""

    def __init__(self, **_: Any):
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict(order.clocks[order.current if stream is None else stream.number])

    def synchronize(self) -> None:
        order.wait(HOST, self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


def current_stream(*_: Any) -> Stream:
    return Stream(number=order.current)


@contextlib.contextmanager
def on(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream."""
    before = order.current
    order.current = before if stream is None else stream.number
    try:
        yield
    finally:
        order.current = before


def synchronize() -> None:
    """The host waits for all streams."""
    for clock in list(order.clocks.values()):
        order.wait(HOST, clock)


# ---- what a Triton kernel writes ------------------------------------------------------------------------------------
@functools.cache
def written(kernel: Any) -> frozenset[str]:
    """The names of the arguments that the addresses of its stores are made of, those of kernels that it calls among
    them. What is loaded makes no address here: a label, say, by which a row is found."""
    function = ast.parse(textwrap.dedent(kernel.src)).body[0]
    made_of: dict[str, set[str]] = {}
    stored: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in set().union(*map(_names, targets)):
                made_of.setdefault(name, set()).update(_names(node.value))
        if isinstance(node, ast.Call):
            called = kernel.fn.__globals__.get(node.func.id) if isinstance(node.func, ast.Name) else None
            if isinstance(node.func, ast.Attribute) and (node.func.attr == "store" or node.func.attr[:6] == "atomic"):
                stored |= _names(node.args[0])
            elif isinstance(called, type(kernel)):
                inner = written(called)
                given = [*zip(called.arg_names, node.args, strict=False), *((x.arg, x.value) for x in node.keywords)]
                stored = stored.union(*(_names(value) for name, value in given if name in inner))
    reached: set[str] = set()
    while stored - reached:
        reached |= stored
        stored = set().union(*(made_of.get(name, set()) for name in stored))
    return frozenset(reached & set(kernel.arg_names))


def _names(node: ast.AST) -> set[str]:
    """Of variables in an expression, but for what it loads."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
        return set()
    own = {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*map(_names, ast.iter_child_nodes(node)))
