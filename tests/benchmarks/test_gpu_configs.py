"""`make gpu`'s part configs: every kernel, two configurations of each, interpreted on tiny shapes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, harness, tables_gpu


def test_configs_run_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KERNELS", "dkdv product adapters norm swiglu rope adamw losses")
    part = gpu.run_part("configs", "cpu", 120)
    assert part["status"] == "passed", part
    kernels: dict[str, list[Any]] = {}
    for row in part["rows"]:
        kernels.setdefault(row["kernel"], []).append(row)
    assert len(kernels) == 13
    for rows in kernels.values():
        assert [row["own"] for row in rows] == [True, False] and all(row["right"] and "ms" in row for row in rows)
        assert {name: rows[0][name] for name in ("tiles", "num_warps", "num_stages")} != {
            name: rows[1][name] for name in ("tiles", "num_warps", "num_stages")}
    fails = {**part["rows"][1], "error": "OutOfResources: shared memory"}
    del fails["ms"], fails["right"]
    rows = [{**part["rows"][0], "ms": {"median": 3.0}}, {**part["rows"][1], "ms": {"median": 2.0}}, fails]
    lines = tables_gpu.gpu_tables({"device": "cpu", "when": "2026-01-02", "machine": harness.machine(),
                                   "parts": {"configs": {**part, "rows": rows}}})
    text = re.sub(" +", " ", "\n".join(lines))
    assert "| 3.000 | BLOCK_M 32, BLOCK_N 32, STAGES 2, 4 warps, 2 stages | 2.000 | 1.50 | 2 of 3 | yes |" in text, text


def test_a_configuration_that_computes_nothing_is_not_right() -> None:
    """Each kernel's own configuration first, and then launches that do nothing."""
    pytest.importorskip("triton")
    code = """
import torch
from triton.runtime.interpreter import GridExecutor
from benchmarks.gpu_configs import LIMIT, Random, kernels
from benchmarks.gpu_timing import error
from tests.kernels import interpreter_bf16
interpreter_bf16.install()
launch = GridExecutor.__call__
for kernel in kernels(torch.device("cpu")):
    GridExecutor.__call__ = launch
    case = kernel.make(Random("cpu", torch.float32), False)
    expected, again = case.checked(kernel.own), case.checked(kernel.own)
    GridExecutor.__call__ = lambda *_, **__: None
    idle = case.checked(kernel.own)
    apart = [max(error(a, b.double()) for a, b in zip(found, expected, strict=True)) for found in (again, idle)]
    print(kernel.name, apart[0] <= LIMIT, apart[1] <= LIMIT, sep=",")
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "KERNELS": "dkdv product adapters norm swiglu rope adamw losses"}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=Path(gpu.__file__).parents[1], text=True,
                         capture_output=True)
    rows = [line.split(",") for line in run.stdout.splitlines()]
    assert len(rows) == 13 and all(row[1:] == ["True", "False"] for row in rows), (rows, run.stderr[-2000:])
