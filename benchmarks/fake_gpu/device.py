"""fake_gpu: a GPU that computes nothing; the true CUDA path over tensors that have a shape and a device, no values.

What it shows without a GPU: operands on two devices, a host that waits, what torch has no rule for, and the bytes that
are live at each moment. What a kernel computes, how long it takes and what CUDA itself refuses it cannot show.

torch reads its CUDA hooks once, so the library of `device.cpp` must be loaded before torch is: `load` comes first, in a
process of its own, and needs a torch without CUDA. Memory that torch's C++ takes within an op is not seen, but for
FlashAttention's (`WITHIN`), nor are cuBLAS's workspaces, 32 MiB for each thread that multiplies on a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

PROCESSORS, TOTAL = 132, 143_771 << 20
"""Of an H200: streaming multiprocessors, bytes."""
SOURCE = Path(__file__).with_name("device.cpp")


def missing() -> str | None:
    """Why there can be no fake GPU here, or None. Torch is not imported for it."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "it needs g++ on Linux"
    if importlib.util.find_spec("triton") is None:
        return "it needs triton: pip install 'minitune[triton]'"
    found = subprocess.run([sys.executable, "-c", "import torch; print(torch.version.cuda)"], capture_output=True,
                           text=True)
    return None if found.stdout.strip() == "None" else "it needs a torch that is built without CUDA"


def build(folder: Path) -> Path:
    """device.cpp compiled against the torch at hand -> the library for `load`."""
    torch = _torch()
    library = folder / "device.so"
    words = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", f"-I{torch / 'include'}", str(SOURCE),
             "-o", str(library), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {run.stderr[-2000:]}")
    return library


def load(library: str | Path) -> None:
    """What `build` made, before the first import of torch."""
    assert "torch" not in sys.modules, "torch has looked for its CUDA hooks already"
    ctypes.CDLL(str(_torch() / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


class Stream:
    """Of torch.cuda."""

    cuda_stream = 0

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, _: Stream) -> None:
        pass

    def wait_event(self, _: Event) -> None:
        pass


class Event:
    """Of torch.cuda."""

    def __init__(self, **_: Any):
        pass

    def record(self, _: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Graph:
    """Of torch.cuda."""

    def replay(self) -> None:
        pass


def flash_backward(*tensors: Any) -> int:
    """Bytes of FlashAttention's deterministic backward: fp32 sums of dq, once more for each part that the keys are
    split into (Dao 2023, arXiv:2307.08691; its mha_varlen_bwd)."""
    q, bounds = tensors[1], next(x for x in tensors if x.dim() == 1 and not x.is_floating_point())
    (tokens, heads, width), documents = q.shape, len(bounds) - 1
    splits = -(-PROCESSORS // (documents * heads))
    return int(splits * (tokens + 128 * documents) * heads * -(-width // 32) * 32 * 4)


WITHIN: dict[str, Callable[..., int]] = {"torch_attn::_varlen_attn_backward": flash_backward}
"""Bytes that an op takes and gives back by itself, by its name."""


def _mode() -> type[Any]:
    """The class Watch, made late: torch must not be imported before `load`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    aten = torch.ops.aten
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    one = {torch.bool: True, **dict.fromkeys(floats, 1.0)}      # what a value is, if the host asks

    class NoDriver(FakeTensorMode):
        avoid_device_init = True        # or torch.tensor([…], device="cuda") would be made in earnest

    class Watch(TorchDispatchMode):
        """Runs what is on the host as it is and fakes what is on the device; keeps the books."""

        def __init__(self) -> None:
            super().__init__()
            self.fake = NoDriver(allow_non_fake_inputs=True)
            self.live, self.peak, self.largest = 0, 0, Counter[tuple[str, int]]()
            self.ops, self.launches, self.waits = Counter[str](), Counter[str](), Counter[str]()
            self.known: dict[int, tuple[str, int, int]] = {}
            self.places: dict[int, weakref.ref[Any]] = {}
            self.next_place = itertools.count(1)

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

        def take(self, x: Any, name: str) -> None:
            storage = x.untyped_storage()
            key = storage._cdata
            if x.device.type != "cuda" or key in self.known:
                return
            n_bytes = -(-storage.nbytes() // 512) * 512     # as torch's allocator rounds

            def gone(_: Any) -> None:
                del self.known[key], self.places[key]
                self.live -= n_bytes

            self.places[key] = weakref.ref(storage, gone)
            self.known[key] = name, n_bytes, next(self.next_place)
            self.live += n_bytes
            self.note()

        def note(self, name: str = "", within: int = 0) -> None:
            if self.live + within > self.peak:
                self.peak = self.live + within
                self.largest = Counter((name, n_bytes) for name, n_bytes, _ in self.known.values())
                self.largest[name, within] += 1

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {key: None if key == "generator" else value for key, value in (kwargs or {}).items()
                      if key != "pin_memory"}
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            faked = [x for x in tensors if isinstance(x, FakeTensor)]
            device = kwargs.get("device")
            if not faked and (device is None or torch.device(device).type != "cuda"):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            name = func._schema.name
            if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
                self.wait(name)
                return one.get(faked[0].dtype, 1)
            if func is aten.copy_.default and args[0].device.type == "cpu":
                self._check_copy(func, args, kwargs)
                return args[0]
            if len(faked) < len(tensors):
                args, kwargs = tree_map(self._faked, (args, kwargs))
            if func in (aten._to_copy.default, aten.copy_.default):
                self._check_copy(func, args, kwargs)
            self.ops[name] += 1
            if func is aten._to_copy.default and device is not None and torch.device(device).type == "cpu":
                with unset_fake_temporarily():
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            with self.fake:
                out = func(*args, **kwargs)
            made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
            for x in made:
                self.take(x, name)
            if name in WITHIN:
                self.note(name, WITHIN[name](*tensors))
            return out

        def _faked(self, x: Any) -> Any:
            real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            return self.fake.from_tensor(x) if real else x

        def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
            """Between host and device without non_blocking, the host waits."""
            to = args[1].device if func is aten.copy_.default else torch.device(kwargs.get("device") or args[0].device)
            goes_on = kwargs.get("non_blocking") or args[2:3] == (True,)
            if args[0].device.type != to.type and not goes_on:
                self.wait(func._schema.name)

    return Watch


@contextlib.contextmanager
def fake_gpu(native: bool = True) -> Iterator[Any]:
    """Within it "cuda" is an H200 that computes nothing, with or without the extension's CUDA half. Gives the Watch."""
    import torch
    from torch._subclasses import fake_tensor
    from triton.runtime.jit import JITFunction

    from minitune.ops import backends, moments8, nf4, rope

    watch = _mode()()
    tables = (backends._native, moments8.table, rope._static, nf4.table, nf4.nested_code)
    about = types.SimpleNamespace(name="a fake H200", total_memory=TOTAL, multi_processor_count=PROCESSORS, major=9,
                                  minor=0)
    gpu = {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
           "is_initialized": lambda: True, "get_device_capability": lambda *_: (9, 0),
           "get_device_name": lambda *_: about.name, "get_device_properties": lambda *_: about,
           "mem_get_info": lambda *_: (TOTAL - watch.live, TOTAL), "memory_allocated": lambda *_: watch.live,
           "memory_reserved": lambda *_: watch.live, "max_memory_allocated": lambda *_: watch.peak,
           "current_stream": lambda *_: Stream(), "Stream": Stream, "Event": Event, "CUDAGraph": Graph,
           "is_bf16_supported": lambda **_: True, "synchronize": lambda *_: watch.wait("synchronize"),
           "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
           **{name: lambda *_, **__: contextlib.nullcontext() for name in ("stream", "device", "device_of", "graph")}}

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        places = {str(x.device) for x in (*args, *options.values()) if isinstance(x, torch.Tensor)}
        assert places <= {"cuda:0"}, f"{kernel.fn.__name__} is given tensors on {sorted(places)}"
        watch.launches[kernel.fn.__name__] += 1

    class Generator(torch.Generator):
        def __new__(cls, *_: Any) -> Any:
            return super().__new__(cls, "cpu")      # type: ignore[call-arg]

    extension = backends._extension

    def half(name: str, absent: str) -> str | None:
        return extension(name, absent) if name == "_C" else None if native else "left out"

    with contextlib.ExitStack() as stack:
        for name, value in gpu.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in ((torch.version, "cuda", "13.0"), (torch.Tensor, "data_ptr", _address(watch)),
                                   (torch.Tensor, "pin_memory", lambda x, *_: x),
                                   (torch.Tensor, "record_stream", lambda *_: None), (JITFunction, "run", launch),
                                   (torch, "Generator", Generator),
                                   (backends, "_extension", half)):
            stack.enter_context(mock.patch.object(owner, name, value))
        if hasattr(fake_tensor, "init_gpu_context"):
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        for table in tables:
            table.cache_clear()
        stack.callback(lambda: [table.cache_clear() for table in tables])
        with watch.fake, watch:
            yield watch


def _address(watch: Any) -> Callable[[Any], int]:
    import torch

    real = torch.Tensor.data_ptr

    def data_ptr(x: Any) -> int:
        return watch.address(x) if x.device.type == "cuda" else real(x)

    return data_ptr
