"""backends: which implementation an op takes on a device: native (C++/CUDA), triton or reference; what is missing, why.

MINITUNE_BACKEND=reference (or native, triton, cudnn), or `with backends.use("reference")`, overrides the choice for
every op that has this backend; asking for one that is not available is an error, not a silent change. cudnn is
attention's alone, forward and backward: fast where the documents are long and equally so, not repeatable to the bit.
MINITUNE_CPU_ISA=portable (or avx2, avx512, avx512_bf16) lowers the instruction set of the native backend on a CPU;
attention has a native half from avx512_bf16 on, products for amx alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from minitune.errors import InputError

NAMES = ("native", "triton", "cudnn", "reference")
OPS: dict[str, tuple[str, ...]] = {
    "nf4": ("native", "triton"), "rms_norm": ("native", "triton"), "swiglu": ("native", "triton"),
    "rope": ("native", "triton"), "linear_cross_entropy": ("native", "triton"), "softmax": ("native",),
    "few_rows": ("native",), "lora_images": ("triton",), "lora_gradients": ("triton",), "adamw": ("triton",),
    "adamw_8bit": ("native", "triton"), "sgd": ("triton",),
    "attention": ("native", "triton", "cudnn"), "lora_matmul": ("triton",), "products": ("native",)}
"""What each op has beside its reference, the preferred one first."""
ROWS = ("rms_norm", "swiglu", "rope", "linear_cross_entropy", "softmax", "few_rows", "adamw_8bit")
"""Whose native half is for a CPU alone, and for ROWS_DTYPES (csrc/rows.h)."""
ROWS_DTYPES = (torch.float32, torch.bfloat16)
TILES = {"attention": ("avx512_bf16", "amx"), "products": ("amx",)}
"""Whose native half is for CPUs that multiply bf16 alone, with the instruction sets that it is for."""
MEASURED = ("attention", "lora_matmul")
"""Where the library is strong: another way is taken only at shapes where it was measured to be faster (`ops/tuned`). Of
attention on a CPU with tiles nothing is measured: the native half is taken."""
_forced: list[str] = []
"""What `use` asks for, innermost last; for the whole process, since autograd runs a GPU's backward in other threads."""


def backends(device: str | torch.device | None = None) -> dict[str, str]:
    """What there is on `device` (default: CUDA where there is one, else the CPU): for each backend "available", or why
    it is not; for each op the backend that it takes. InputError for a device that torch does not know, and for an
    unknown name in MINITUNE_BACKEND."""
    asked()
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise InputError(f"backends: device is {device!r}, which torch does not know ({str(error)[:80]}); give \"cpu\" "
                         'or "cuda"') from None
    found = {}
    for name in NAMES:
        try:
            found[name] = missing(name, place) or "available"
        except InputError as error:
            found[name] = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # what a warning would say stands in the answer
        return found | {op: _choice(op, place) for op in OPS}


def _choice(op: str, device: torch.device) -> str:
    try:
        taken = choose(op, device)
    except InputError as error:
        return str(error)
    if op in MEASURED and taken == "reference" and asked() != "reference" and not missing("triton", device):
        return "the library; other ways where `minitune tune` measured them to be faster"
    return taken


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within it every op, in every thread, takes this backend. InputError for an unknown name."""
    _check_name(name, "backends.use")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose(op: str, device: torch.device, measured: str | None = None, dtype: torch.dtype | None = None,
           but: tuple[str, ...] = ()) -> str:
    """The backend of `op` on `device`: the one asked for if the op has it, else the first that is there; its absence is
    said once. `measured`: the fastest for an op of MEASURED, which may be a way of its own; None: nothing is known; it
    says nothing where the op has a native half.
    `dtype`: of the values, where a backend does not take all; `but`: those that do not take these values."""
    told = asked()
    if told == "reference" or (told and _has(op, told, device, dtype)):
        reason = missing(told, device)
        if reason:
            raise InputError(f"the backend {told!r} was asked for, but on {device.type}: {reason}")
        if told not in but:
            return told
    if op in MEASURED and not _has(op, "native", device, dtype):
        return "reference" if measured is None or (measured in NAMES and missing(measured, device)) else measured
    reasons = []
    for name in OPS[op]:
        if not _has(op, name, device, dtype) or (name == "triton" and device.type != "cuda"):
            continue        # the interpreter is there to be asked for
        reason = missing(name, device)
        if not reason:
            return name
        reasons.append(f"{name}: {reason}")
    if reasons and device.type in ("cpu", "cuda"):
        _announce(op, device.type, "; ".join(reasons))
    return "reference"


def _has(op: str, name: str, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether the op has this backend for such values, be it there or not."""
    if name == "cudnn":     # by being asked for, or measured, alone
        return name in OPS[op]
    if name == "native" and op in ROWS:
        return device.type == "cpu" and (dtype is None or dtype in ROWS_DTYPES)
    if name == "native" and op in TILES:
        return device.type == "cpu" and dtype in (None, torch.bfloat16) and _may_have(TILES[op])
    return name in OPS[op] and not (name == "triton" and dtype == torch.float64)


def asked() -> str | None:
    """The backend that is asked for by name, if one is."""
    name = _forced[-1] if _forced else os.environ.get("MINITUNE_BACKEND")
    if name:
        _check_name(name, "MINITUNE_BACKEND")
    return name or None


def by_rows(op: str, x: Tensor) -> bool:
    """Whether the extension's row ops take `op` on x: fp32 or bf16 on a CPU, [T, d] or [T, heads, d] with heads and
    values side by side."""
    return choose(op, x.device, dtype=x.dtype) == "native" and side_by_side(x)


def side_by_side(x: Tensor) -> bool:
    """Whether x is [T, d] or [T, heads, d] whose heads, and their values, lie side by side; rows may lie apart."""
    shape, strides = x.shape, x.stride()
    if len(shape) not in (2, 3) or strides[-1] != 1:
        return False
    heads = len(shape) == 2 or shape[1] < 2 or strides[1] == shape[2]
    return heads and (shape[0] < 2 or strides[0] >= math.prod(shape[1:]))


def missing(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, or None. InputError for an extension that is there but does not load."""
    if name == "reference":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU here"
    if name == "native":
        return _native(device.type)
    if name == "cudnn":
        return _no_cudnn(device)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton kernels need a GPU of sm_80 or newer"
    return _no_triton()


def _may_have(isas: tuple[str, ...]) -> bool:
    """Whether the extension takes one of these instruction sets; True where it is not there to be asked."""
    if _native("cpu") is not None:
        return True
    try:
        taken: str = importlib.import_module("minitune._C").cpu_isa()
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return taken in isas


def _no_cudnn(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "cuDNN needs a GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "cuDNN's attention needs a GPU of sm_80 or newer"
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


@functools.lru_cache(maxsize=1)
def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.lru_cache(maxsize=4)
def _native(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"the extension has no {device_type} half"
    reason = _extension("_C", "it was not built at installation: no C++ compiler, MINITUNE_NATIVE=0, or a build in "
                              "isolation from torch (pip install -v --no-build-isolation says which)")
    if reason or device_type == "cpu":
        return reason
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return _extension("_C_cuda", "its CUDA half was not built at installation: no nvcc, or MINITUNE_CUDA=0")


def _extension(name: str, absent: str) -> str | None:
    """Import a module of the extension, which registers its ops; why it is absent, or None."""
    spec = importlib.util.find_spec(f"minitune.{name}")
    if spec is None:
        return absent
    try:
        module = importlib.import_module(f"minitune.{name}")
    except ImportError as error:
        raise InputError(f"{spec.origin}: does not load with torch {torch.__version__} ({error}); it was built for "
                         "another torch or machine: install minitune again with --no-build-isolation, or set "
                         "MINITUNE_BACKEND=reference to do without") from None
    try:
        importlib.import_module("minitune.ops.nf4_native")
        importlib.import_module("minitune.ops.rows_native")
    except RuntimeError as error:       # an op that the sources have by now
        raise InputError(f"{spec.origin}: was built of older sources than these ({error}); build it anew: make "
                         "install, or python setup.py build_ext --inplace") from None
    if name == "_C":
        try:
            module.cpu_isa()
        except RuntimeError as error:       # a MINITUNE_CPU_ISA that this CPU does not have
            raise InputError(str(error)) from None
    return None


_announced: set[tuple[str, str]] = set()


def _announce(op: str, device_type: str, reason: str) -> None:
    """Once for each device and reason, by the first op that misses it."""
    if (device_type, reason) not in _announced:
        _announced.add((device_type, reason))
        warnings.warn(f"{op} on {device_type} runs as plain PyTorch, slower, as other ops do, since the faster ways "
                      f"are missing: {reason}", stacklevel=4)


def _check_name(name: str, where: str) -> None:
    if name not in NAMES:
        raise InputError(f"{where} is {name!r}; it must be one of {', '.join(NAMES)}")
