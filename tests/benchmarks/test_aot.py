"""KERNELS.md, from a kernel that is compiled here for a GPU that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import tables
from benchmarks.aot import ROWS
from benchmarks.aot.__main__ import described
from benchmarks.aot.compile import compile_for
from benchmarks.harness import save
from benchmarks.tables_aot import kernels_page


def _raw(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"name": "aot", "when": "2026-01-02T03:04:05Z", "kind": "aot", "device": "none", "rows": list(rows),
            "machine": {"cpu": "a processor", "commit": "0123456789abcdef", "dirty": False,
                        "versions": {"triton": "3.6.0"}}}


def test_the_page_says_what_the_compiler_gave_and_what_breaks_its_budget() -> None:
    row = next(row for row in ROWS if row.name.startswith("swiglu_forward"))
    report = compile_for(row, 90)
    good = described(row, 90, report)
    assert good["kernel"] == "swiglu_forward" and good["registers"] == report.registers and good["spills"] == 0
    assert good["tiles"] == {"BLOCK": 1024} and not good["faults"]
    wide = described(replace(row, registers=4), 90, report)
    assert wide["faults"] == [f"{report.registers} registers, the budget is 4"]
    text = kernels_page(_raw(good, wide))
    assert "1 of 2 keep their budget" in text and f"| {report.registers} " in text and wide["faults"][0] in text


def test_the_command_of_the_tables_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("aot", _raw(), tmp_path)
    page = tmp_path / "KERNELS.md"
    monkeypatch.setattr("sys.argv", ["tables", "--results", str(tmp_path), "--page", str(tmp_path / "RESULTS.md"),
                                     "--kernels", str(page), "--readme", str(tmp_path / "none")])
    tables.main()
    assert page.read_text().startswith("# What the Triton kernels take")
