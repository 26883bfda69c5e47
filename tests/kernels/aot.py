"""Compiles Triton kernels for GPUs that are not there, and reads from the machine code what they cost.

A `Row` is one kernel in one configuration; test_aot.py holds the list of them. The launcher tells the compiler which
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
SPILLS = ("LDL", "STL")
"""Loads and stores of a thread's own memory, where registers go that find no room."""


@dataclass(frozen=True)
class Row:
    """signature: the run-time arguments, e.g. "*bf16:16" or "i32"; constants: all others; options: num_warps,
    num_stages, … as at the launch; registers: what a thread may take; has, lacks: instructions that must and must not
    be there; stores: the bits of each store to global memory, None = any.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    registers: int
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = SPILLS
    stores: int | None = None


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
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=row.options)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"]))
    assert usage, f"{row.name}: cuobjdump tells no registers"
    code = _tool("nvdisasm", "-c", compiled.asm["cubin"])
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    return Report(
        registers=int(usage[1]), stack=int(usage[2]), shared=compiled.metadata.shared,
        instructions=Counter(code.split(".")[0] for code in opcodes),
        store_bits={_bits(code) for code in opcodes if code.startswith("STG")}, ptx=compiled.asm["ptx"])


def faults(row: Row, report: Report) -> list[str]:
    """What a row promises and the machine code does not keep."""
    found = []
    if report.registers > row.registers:
        found.append(f"{report.registers} registers, the budget is {row.registers}")
    if report.stack:
        found.append(f"{report.stack} bytes of stack")
    found += [f"no {name}" for name in row.has if not report.instructions[name]]
    found += [f"{report.instructions[name]} {name}" for name in row.lacks if report.instructions[name]]
    if row.stores is not None and report.store_bits != {row.stores}:
        found.append(f"stores of {sorted(report.store_bits)} bits, not of {row.stores}")
    return found


def _bits(opcode: str) -> int:
    """STG.E.128 -> 128; a store that names no width has 32 bits."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
    return int(width[1]) if width else 32


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(TOOLS / name), flag, file.name], check=True, capture_output=True, text=True).stdout
