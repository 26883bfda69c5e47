"""watch: the mode under which what is on the host runs as it is and what is on the device is faked, with its books."""

from __future__ import annotations

import itertools
import os
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.fake_gpu.launches import Launches
from benchmarks.fake_gpu.order import HOST, Order, written

PROCESSORS = 132
"""Of an H200: streaming multiprocessors."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ONE: dict[torch.dtype, Any] = {torch.bool: True, **dict.fromkeys(FLOATS, 1.0)}
"""What a value is, if the host asks; 1 for other dtypes."""


def flash_backward(*tensors: Any) -> int:
    """Bytes of FlashAttention's deterministic backward: fp32 sums of dq, once more for each part that the keys are
    split into, and dk and dv of grouped heads (Dao 2023, arXiv:2307.08691; its mha_varlen_bwd)."""
    q, bounds = tensors[1], next(x for x in tensors if x.dim() == 1 and not x.is_floating_point())
    (tokens, heads, width), documents = q.shape, len(bounds) - 1
    splits = -(-PROCESSORS // (documents * heads))
    sums = splits * (tokens + 128 * documents) * heads * -(-width // 32) * 32 * 4
    grouped = tensors[2].shape[1] < heads       # dk and dv of each query head, before they are added up
    return int(sums + (2 * tokens * heads * width * q.element_size() if grouped else 0))


WITHIN: dict[str, Callable[..., int]] = {"aten::_flash_attention_backward": flash_backward}
"""Bytes that an op takes and gives back by itself, by its name."""


class NoDriver(FakeTensorMode):
    avoid_device_init = True        # or torch.tensor([…], device="cuda") would be made in earnest


class Watch(TorchDispatchMode):
    """Runs what is on the host as it is and fakes what is on the device; keeps the books."""

    def __init__(self, order: Order, kernels: Launches) -> None:
        super().__init__()
        self.order, self.kernels = order, kernels
        self.fake = NoDriver(allow_non_fake_inputs=True)
        self.live, self.peak, self.largest = 0, 0, Counter[tuple[str, int]]()
        self.ops, self.launches, self.waits = Counter[str](), Counter[str](), Counter[str]()
        self.known: dict[int, tuple[str, int, int]] = {}
        self.places: dict[int, weakref.ref[Any]] = {}
        self.next_place = itertools.count(1)
        self.pinned: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Forget what was counted; the peak starts from what is live."""
        self.peak, self.largest = self.live, Counter()
        for counter in (self.ops, self.launches, self.waits):
            counter.clear()

    def most(self, n: int) -> list[tuple[tuple[str, int], int]]:
        """At the peak: ((the op that made it, bytes), how many of them), the largest sums first."""
        return sorted(self.largest.items(), key=lambda entry: -entry[0][1] * entry[1])[:n]

    def address(self, x: Any) -> int:
        """What x.data_ptr() would say: no two storages overlap."""
        storage = self.known[x.untyped_storage()._cdata]
        return (storage[2] << 40) + x.storage_offset() * x.element_size()

    def wait(self, what: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if f"{os.sep}minitune{os.sep}" in frame.filename]
        place = f"{os.path.basename(lines[-1].filename)}:{lines[-1].lineno}" if lines else "outside"
        self.waits[f"{what} in {place}"] += 1
        self.order.wait(HOST, self.order.clocks[self.order.current])

    def take(self, x: Any, name: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if x.device.type != "cuda" or key in self.known:
            return
        n_bytes = -(-storage.nbytes() // 512) * 512     # as torch's allocator rounds

        def gone(_: Any) -> None:
            del self.known[key], self.places[key]
            self.live -= n_bytes
            self.order.gone(key)

        self.places[key] = weakref.ref(storage, gone)
        self.known[key] = name, n_bytes, next(self.next_place)
        self.order.taken(key, name)
        if not name.startswith(("aten::empty", "aten::new_empty")):
            self.order.work(name, set(), {key})
        self.live += n_bytes
        self.note()

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """x, a tensor on the host, as one in pinned memory."""
        storage = x.untyped_storage()
        key = storage._cdata
        self.order.gone(key)        # of what lay there before
        self.pinned[key] = weakref.ref(storage, lambda _: self.pinned.pop(key))
        return x

    def touched(self, func: Any, args: Any, kwargs: Any, who: int | None = None) -> None:
        """Tell `order` of the device's and the pinned storages that an op reads and writes."""
        reads, writes = set[int](), set[int]()
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            writes_it = argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value):
                if isinstance(x, torch.Tensor) and self.has(key := x.untyped_storage()._cdata):
                    (writes if writes_it else reads).add(key)
        if (reads or writes) and not func.is_view:
            self.order.work(func._schema.name, reads, writes, who)

    def has(self, key: int) -> bool:
        return key in self.known or key in self.pinned

    def launched(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """The same of a Triton kernel."""
        out = written(kernel)
        assert out, f"{kernel.fn.__name__} stores nothing"
        keys = {name: x.untyped_storage()._cdata for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        writes = {key for name, key in keys.items() if name in out}
        self.order.work(kernel.fn.__name__, set(keys.values()) - writes, writes)

    def note(self, name: str = "", within: int = 0) -> None:
        if self.live + within > self.peak:
            self.peak = self.live + within
            self.largest = Counter((name, n_bytes) for name, n_bytes, _ in self.known.values())
            if within:
                self.largest[name, within] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pins = bool((kwargs or {}).get("pin_memory"))
        kwargs = {key: None if key == "generator" else value for key, value in (kwargs or {}).items()
                  if key != "pin_memory"}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        faked = [x for x in tensors if isinstance(x, FakeTensor)]
        device = kwargs.get("device")
        if not faked and (device is None or torch.device(device).type != "cuda"):
            self.touched(func, args, kwargs, HOST)
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            return self.pin(out) if pins else out
        name = func._schema.name
        self.touched(func, args, kwargs)
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
            self.wait(name)
            return ONE.get(faked[0].dtype, 1)
        if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu":
            self._check_copy(func, args, kwargs)
            return args[0]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._check_copy(func, args, kwargs)
        if len(faked) < len(tensors):
            args, kwargs = tree_map(self._faked, (args, kwargs))
        self.ops[name] += 1
        if func is torch.ops.aten._to_copy.default and device is not None and torch.device(device).type == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.take(x, name)
        if name in WITHIN:
            self.note(name, WITHIN[name](*tensors))
        return out

    def _faked(self, x: Any) -> Any:
        real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.fake.from_tensor(x) if real else x

    def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Between host and device the host waits without non_blocking, and where its own side is not pinned."""
        copies = func is torch.ops.aten.copy_.default
        to = args[1].device if copies else torch.device(kwargs.get("device") or args[0].device)
        if args[0].device.type == to.type:
            return
        host = next((x for x in args[: 1 + copies] if x.device.type == "cpu"), None)
        pinned = host is None or host.untyped_storage()._cdata in self.pinned
        if not (pinned and (kwargs.get("non_blocking") or args[2:3] == (True,))):
            self.wait(func._schema.name)
