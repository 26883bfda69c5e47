"""few_rows: one row, a few rows and the packed weight against the plain product."""

import pytest
import torch

from minitune.ops import few_rows
from tests.tolerance import check


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product(dtype, rows, bias, packed):
    weight, x = torch.randn(77, 120).to(dtype), torch.randn(rows, 120).to(dtype)
    b = torch.randn(77).to(dtype) if bias else None
    copy = few_rows.pack(weight) if packed else None
    if packed and copy is None:
        pytest.skip("this CPU, dtype or torch has no packed product of oneDNN")
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    check("y", few_rows.product(x, weight, b, copy), torch.nn.functional.linear(x, weight, b), truth)


def test_other_dtypes_are_not_packed():
    assert few_rows.pack(torch.randn(4, 4)) is None
