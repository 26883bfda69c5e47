"""packed_weight: the packed product against the plain one."""

import pytest
import torch

from minitune.ops import packed_weight
from tests.tolerance import check


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_product(rows, bias):
    weight, x = torch.randn(77, 120).bfloat16(), torch.randn(rows, 120).bfloat16()
    b = torch.randn(77).bfloat16() if bias else None
    packed = packed_weight.pack(weight)
    if packed is None:
        pytest.skip("this CPU or torch has no bf16 product of oneDNN")
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    check("y", packed_weight.product(x, packed, b), torch.nn.functional.linear(x, weight, b), truth)


def test_other_dtypes_are_not_packed():
    assert packed_weight.pack(torch.randn(4, 4)) is None
