"""Every kernel, as it is launched, compiles for every GPU that we know of and keeps its budget."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.aot import ROWS
from benchmarks.aot.compile import Row, compile_for, faults

RARE = ("16384", "apply", "without h", "fp16", "any length", "first scaled", "nf4_dequantize fp32", "fp32 4096", "x 80",
        "rank behind", "x80", "R 48 bias", "dB R 48", "forward_s 4096, R 32", "forward_s 4096, R 128")
"""Second shapes of a configuration that another row compiles already: too long for CI, `make test-all` has them."""


def _case(row: Row, arch: int):
    marks = [pytest.mark.slow] if any(word in row.name for word in RARE) else []
    return pytest.param(row, arch, marks=marks, id=f"{row.name} sm_{arch}")


@pytest.mark.parametrize(("row", "arch"), [_case(row, arch) for row in ROWS for arch in row.arches])
def test_a_kernel_keeps_its_budget(row: Row, arch: int) -> None:
    found = faults(row, compile_for(row, arch), arch)
    assert not found, f"{row.name} on sm_{arch}: {'; '.join(found)}"
