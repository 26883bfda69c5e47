"""few_rows: one row, a few rows and the packed weight against the plain product."""

import pytest
import torch

from minitune.ops import few_rows
from tests.tolerance import check

WAYS = {"bf16": (torch.bfloat16, False), "fp32": (torch.float32, False), "bf16 packed": (torch.bfloat16, True)}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "packed"), WAYS.values(), ids=WAYS)
def test_product(dtype, rows, bias, packed):
    weight, x = torch.randn(77, 120).to(dtype), torch.randn(rows, 120).to(dtype)
    b = torch.randn(77).to(dtype) if bias else None
    copy = few_rows.pack(weight) if packed else None
    if packed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no product in bf16 on this CPU")
    assert (copy is not None) == packed
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    check("y", few_rows.product(x, weight, b, copy), torch.nn.functional.linear(x, weight, b), truth)


def test_other_dtypes_are_not_packed():
    assert few_rows.pack(torch.randn(4, 4)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_has_its_gradients(dtype, bias):
    weight, x = torch.randn(7, 64).to(dtype).requires_grad_(), torch.randn(1, 64).to(dtype).requires_grad_()
    b = torch.randn(7).to(dtype) if bias else None
    few_rows.product(x, weight, b).sum().backward()
    assert torch.equal(weight.grad, x.detach().expand(7, 64)) and x.grad.shape == x.shape
    with torch.no_grad():
        check("y", few_rows.product(x, weight, b), torch.nn.functional.linear(x, weight, b),
              torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double()))


def test_one_row_may_lie_apart_and_have_no_columns():
    weight, wide = torch.randn(5, 64).bfloat16(), torch.randn(1, 128).bfloat16()
    assert torch.equal(few_rows.product(wide[:, ::2], weight), few_rows.product(wide[:, ::2].contiguous(), weight))
    assert torch.equal(few_rows.product(wide[:, :0], weight[:, :0]), torch.zeros(1, 5, dtype=torch.bfloat16))
