"""fake_gpu: a GPU that computes nothing; the true CUDA path over tensors that have a shape and a device, no values.

What it shows without a GPU: operands on two devices, a host that waits, what torch has no rule for, the bytes that are
live at each moment, and memory that two streams touch in no order (order.py). What a kernel computes, how long it takes
and what CUDA itself refuses it cannot show.

torch reads its CUDA hooks once, so the library of `device.cpp` must be loaded before torch is: `load` comes first, in a
process of its own, and needs a torch without CUDA. Memory that torch's C++ takes within an op is not seen, but for
FlashAttention's (`watch.WITHIN`), nor are cuBLAS's workspaces, 32 MiB for each thread that multiplies on a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

TOTAL = 143_771 << 20
"""Bytes of an H200."""
SOURCE = Path(__file__).with_name("device.cpp")


@functools.cache
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


class Graph:
    """Of torch.cuda."""

    def replay(self) -> None:
        pass


@contextlib.contextmanager
def fake_gpu(native: bool = True, kernels: Any = None) -> Iterator[Any]:
    """Within it "cuda" is an H200 that computes nothing, with or without the extension's CUDA half. Gives the Watch.
    `kernels`: the Launches that those of Triton kernels are added to, by which it may be of another generation."""
    import torch
    from torch._subclasses import fake_tensor
    from triton.runtime.jit import JITFunction

    from benchmarks.fake_gpu import order
    from benchmarks.fake_gpu.launches import Launches
    from benchmarks.fake_gpu.watch import Watch
    from minitune.kernels.launch import generation
    from minitune.ops import backends, moments8, nf4, rope

    watch = Watch(order.begin(), kernels or Launches(90))
    tables = (backends._native, moments8.table, rope._static, nf4.table, nf4.nested_code, generation)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        places = {str(x.device) for x in (*args, *options.values()) if isinstance(x, torch.Tensor)}
        assert places <= {"cuda:0"}, f"{kernel.fn.__name__} is given tensors on {sorted(places)}"
        watch.launches[kernel.fn.__name__] += 1
        watch.kernels.add(kernel, args, grid, options)
        watch.launched(kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **options})

    class Generator(torch.Generator):
        def __new__(cls, *_: Any) -> Any:
            return super().__new__(cls, "cpu")      # type: ignore[call-arg]

    extension = backends._extension

    def half(name: str, absent: str) -> str | None:
        return extension(name, absent) if name == "_C" else None if native else "left out"

    with contextlib.ExitStack() as stack:
        for name, value in _cuda(watch).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in ((torch.version, "cuda", "13.0"), (torch.Tensor, "data_ptr", _address(watch)),
                                   (torch.backends.cudnn, "is_available", lambda: True),
                                   (torch.Tensor, "pin_memory", lambda x, *_: watch.pin(x.clone())),
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


def _cuda(watch: Any) -> dict[str, Any]:
    """What stands in torch.cuda meanwhile."""
    import torch

    from benchmarks.fake_gpu import order
    from benchmarks.fake_gpu.watch import PROCESSORS

    def synchronize(*_: Any) -> None:
        watch.wait("synchronize")
        order.synchronize()

    major, minor = divmod(watch.kernels.arch, 10)
    about = types.SimpleNamespace(name="a fake H200", total_memory=TOTAL, multi_processor_count=PROCESSORS, major=major,
                                  minor=minor)
    return {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_initialized": lambda: True, "get_device_capability": lambda *_: (major, minor),
            "get_device_name": lambda *_: about.name, "get_device_properties": lambda *_: about,
            "mem_get_info": lambda *_: (TOTAL - watch.live, TOTAL), "memory_allocated": lambda *_: watch.live,
            "memory_reserved": lambda *_: watch.live, "max_memory_allocated": lambda *_: watch.peak,
            "reset_peak_memory_stats": lambda *_: None,
            "current_stream": order.current_stream, "Stream": order.Stream, "Event": order.Event,
            "stream": order.on, "CUDAGraph": Graph,
            "is_bf16_supported": lambda **_: True, "synchronize": synchronize,
            "empty_cache": lambda: None,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
            **{name: lambda *_, **__: contextlib.nullcontext() for name in ("device", "device_of", "graph")}}


def leave() -> NoReturn:
    """End the process with success, without taking it apart: now and then autograd's thread for a device that is not
    there outlives what it stands on, and the process would be aborted."""
    sys.stdout.flush()
    os._exit(0)


def _address(watch: Any) -> Callable[[Any], int]:
    import torch

    real = torch.Tensor.data_ptr

    def data_ptr(x: Any) -> int:
        return watch.address(x) if x.device.type == "cuda" else real(x)

    return data_ptr
