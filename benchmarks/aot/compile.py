"""Compiles Triton kernels for GPUs that are not there, and reads from the machine code what they cost.

A `Row` is one kernel in one configuration; rows_*.py hold them. The launcher tells the compiler which
pointers and sizes are divisible by 16; here the row says it (":16"), for without it loads and stores are narrow.
What is 1 or None at a launch is a constant, and so are tl.constexpr arguments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHES = (80, 89, 90, 100)
SPILLS = ("LDL", "STL")
"""Loads and stores of a thread's own memory, where registers go that find no room."""
TRITON = "3.6.0"
"""Whose registers the budgets count. Another version gives them out otherwise; then a kernel may miss its budget, and
spill a few values (SLACK bytes a thread), but is held to all else."""
SLACK = 64
MATRIX = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
"""The instruction that multiplies 16-bit matrices on each generation."""


@dataclass(frozen=True)
class Row:
    """signature: the run-time arguments, e.g. "*bf16:16" or "i32"; constants: all others; options: num_warps,
    num_stages, … as at the launch; registers: what a thread may take; shared: bytes that a program may take; arches:
    the generations that are launched so; matrix: the products must run on the matrix unit; lacks: instructions that
    must not be there; stores: the bits of each store to global memory, None = any; exact: nothing that could change a
    bit, neither flushed small numbers nor an inexact division.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    registers: int
    shared: int = 0
    arches: tuple[int, ...] = ARCHES
    matrix: bool = False
    lacks: tuple[str, ...] = SPILLS
    stores: int | None = None
    exact: bool = False


@dataclass
class Report:
    """What one compilation gave: registers and bytes of stack a thread, shared memory, instructions by their names."""

    registers: int
    stack: int
    shared: int
    instructions: Counter[str]
    store_bits: set[int]
    ptx: str = field(repr=False)


def compile_for(row: Row, arch: int) -> Report:
    """arch: 80, 89, 90, 100, …"""
    names = row.kernel.arg_names
    kinds = {name: row.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=row.kernel, signature={name: kind.removesuffix(":16") for name, kind in kinds.items()},
        constexprs={(names.index(name),): value for name, value in row.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind.endswith(":16")})
    return compiled(source, arch, row.options, row.name)


def compiled(source: ASTSource, arch: int, options: dict[str, Any], name: str) -> Report:
    """A kernel with its signature, constants and attributes, for one generation."""
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", made.asm["cubin"]))
    assert usage, f"{name}: cuobjdump tells no registers"
    code = _tool("nvdisasm", "-c", made.asm["cubin"])
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    return Report(
        registers=int(usage[1]), stack=int(usage[2]), shared=made.metadata.shared,
        instructions=Counter(code.split(".")[0] for code in opcodes),
        store_bits={_bits(code) for code in opcodes if code.startswith("STG")}, ptx=made.asm["ptx"])


def known() -> bool:
    """Whether this is the Triton of the budgets."""
    return bool(triton.__version__ == TRITON)


def spilt(report: Report) -> list[str]:
    """Memory that registers found no room in, where it is more than there may be."""
    return [f"{report.stack} bytes of stack"] if report.stack > (0 if known() else SLACK) else []


def faults(row: Row, report: Report, arch: int) -> list[str]:
    """What a row promises and the machine code does not keep."""
    found = spilt(report)
    if known() and report.registers > row.registers:
        found.append(f"{report.registers} registers, the budget is {row.registers}")
    if report.shared > row.shared:
        found.append(f"{report.shared} bytes of shared memory, the budget is {row.shared}")
    if arch == 90 and row.matrix and "serialized" in _assembler_says(report.ptx):
        found.append("ptxas lets its matrix instructions wait for each other")
    found += [f"no {name}" for name in MATRIX[arch] if row.matrix and not report.instructions[name]]
    found += [f"{report.instructions[name]} {name}" for name in row.lacks
              if report.instructions[name] and (known() or name not in SPILLS)]
    if row.stores is not None and report.store_bits != {row.stores}:
        found.append(f"stores of {sorted(report.store_bits)} bits, not of {row.stores}")
    if row.exact and ".ftz" in report.ptx:
        found.append("flushes small numbers to zero")
    if row.exact and ("div.full" in report.ptx or "div.approx" in report.ptx):
        found.append("inexact division")
    return found


def _assembler_says(ptx: str) -> str:
    """What ptxas remarks on code for sm_90; Triton does not show it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        return subprocess.run([str(TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", str(source), "-o", f"{source}.o"],
                              check=True, capture_output=True, text=True).stderr


def _bits(opcode: str) -> int:
    """STG.E.128 -> 128; a store that names no width has 32 bits."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
    return int(width[1]) if width else 32


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(TOOLS / name), flag, file.name], check=True, capture_output=True, text=True).stdout
