"""Launches: what Triton makes of each launch on the fake GPU: bound to the kernel's arguments, specialised by their
values and addresses, and compiled as it would be on the first launch. (The rows of benchmarks/aot say it by hand.)"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.aot.compile import Report, compiled, spilt

MOST = 2**31 - 1, 65_535, 65_535
"""Programs in each dimension of a grid."""
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may take of a processor's shared memory."""


class Launch(NamedTuple):
    """A kernel as one launch or several need it, all that decides what it is compiled to."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        names = self.kernel.arg_names
        told, known = ({names[path[0]]: value for path, value in each.items()} for each in (self.constants,
                                                                                           self.attributes))
        options = {name: value for name, value in vars(self.options).items()
                   if name != "extern_libs" and value != getattr(type(self.options), name, None)}
        return f"{self.kernel.fn.__name__} {self.signature} {told} {known} {self.options.num_warps} warps {options}"

    def faults(self, arch: int) -> list[str]:
        """What this generation of GPUs would refuse, or run slowly."""
        report: Report = compiled(ASTSource(self.kernel, self.signature, self.constants, self.attributes),
                                  arch, self.options.__dict__, self.name)
        return spilt(report) + [f"{report.shared} bytes of shared memory"] * (report.shared > SHARED[arch])


class Launches:
    """All launches of a generation `arch`; ``found`` holds those that differ, by what makes them differ."""

    def __init__(self, arch: int) -> None:
        self.arch, self.backend = arch, make_backend(GPUTarget("cuda", arch, 32))
        self.binders: dict[int, Any] = {}
        self.found: dict[str, Launch] = {}

    def add(self, kernel: Any, args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        """Raises what Triton would raise for arguments that do not fit, and ValueError for a grid that CUDA refuses."""
        if id(kernel) not in self.binders:
            self.binders[id(kernel)] = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        given = {**options, "debug": False, "instrumentation_mode": ""}
        bound, specialization, _ = self.binders[id(kernel)](*args, **given)
        packed, signature, constants, attributes = kernel._pack_args(self.backend, given, bound, specialization, None)
        sizes = grid(bound) if callable(grid) else grid
        if not all(0 < size <= most for size, most in zip(sizes, MOST, strict=False)):
            raise ValueError(f"{kernel.fn.__name__}: its grid is {sizes}")
        launch = Launch(kernel, signature, constants, attributes, packed)
        self.found.setdefault(launch.name, launch)
