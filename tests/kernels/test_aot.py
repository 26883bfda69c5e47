"""Every kernel, as it is launched, compiles for every GPU that we know of and keeps its budget."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels import rows_lora_matmul, rows_losses, rows_nf4, rows_optimizers, rows_pointwise
from tests.kernels.aot import Row, compile_for, faults

ROWS = [*rows_lora_matmul.ROWS, *rows_losses.ROWS, *rows_nf4.ROWS, *rows_pointwise.ROWS, *rows_optimizers.ROWS]


@pytest.mark.parametrize(("row", "arch"), [(row, arch) for row in ROWS for arch in row.arches],
                         ids=lambda value: value.name if isinstance(value, Row) else f"sm_{value}")
def test_a_kernel_keeps_its_budget(row: Row, arch: int) -> None:
    found = faults(row, compile_for(row, arch), arch)
    assert not found, f"{row.name} on sm_{arch}: {'; '.join(found)}"
