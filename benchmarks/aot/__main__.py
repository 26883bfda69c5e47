"""Compiles every kernel for every generation of GPUs and keeps what each one costs, beside its budget.

``python -m benchmarks.aot`` writes benchmarks/results/<date>-aot.json, of which ``python -m benchmarks.tables`` makes
benchmarks/KERNELS.md. No GPU is needed; two minutes on two cores. Exit code 1: a kernel does not keep its budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.aot import ROWS
from benchmarks.aot.compile import MATRIX, SPILLS, Report, Row, compile_for, faults
from benchmarks.harness import save

TILES = ("TILE", "BLOCK", "ROWS", "BLOCK_M", "BLOCK_N", "STAGES", "BT", "BN", "BK", "BR", "BC", "TOKENS", "CHUNK",
         "VALUES")
"""Constants that are a configuration's choice; the others are a model's sizes."""


def described(row: Row, arch: int, report: Report) -> dict[str, Any]:
    """One line of the table: the configuration, what the machine code takes, what it may take."""
    tiles = {name: value for name, value in row.constants.items() if name in TILES}
    return {"what": "aot", "kernel": row.kernel.fn.__name__, "case": row.name, "arch": arch, "tiles": tiles,
            "warps": row.options["num_warps"], "stages": row.options.get("num_stages", 1),
            "registers": report.registers, "register_budget": row.registers, "shared": report.shared,
            "shared_budget": row.shared, "stack": report.stack,
            "spills": sum(report.instructions[name] for name in SPILLS), "matrix_wanted": row.matrix,
            "matrix": {name: report.instructions[name] for name in MATRIX[arch] if report.instructions[name]},
            "faults": faults(row, report, arch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the raw file, default benchmarks/results")
    parser.add_argument("--only", default="", help="kernels whose case has this in its name; nothing is written")
    told = parser.parse_args()
    begun, found = time.monotonic(), []
    for row in (row for row in ROWS if told.only in row.name):
        for arch in row.arches:
            found.append(described(row, arch, compile_for(row, arch)))
            print(f"{row.name}, sm_{arch}: {found[-1]['registers']} registers", file=sys.stderr, flush=True)
    broken = [line for line in found if line["faults"]]
    for line in broken:
        print(f"{line['case']}, sm_{line['arch']}: {'; '.join(line['faults'])}")
    if not told.only:
        path = save("aot", {"kind": "aot", "device": "none", "rows": found}, told.out)
        print(f"{len(found)} compiled in {time.monotonic() - begun:.0f} s; raw figures: {path.name}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
