"""dora: the rows' lengths without the sum equal those of the sum, and a cancelled row is no division by zero."""

import pytest
import torch

from minitune.ops import dora
from tests.tolerance import check, relative

N, K, R = 37, 53, 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_lengths_are_those_of_the_sum(dtype):
    weight, a, b = (torch.randn(shape).to(dtype) for shape in ((N, K), (R, K), (N, R)))
    wide = [value.double() for value in (weight, a, b)]
    plain = torch.linalg.vector_norm((weight + b @ a).float(), dim=1)
    check("lengths", dora.row_lengths(weight, a, b), plain, dora.reference(*wide))
    alone = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    assert relative(dora.row_lengths(weight, None, None), alone) < 1e-6


def test_a_row_that_the_adapter_cancels_has_a_positive_length():
    weight = torch.zeros(3, K)
    assert (dora.row_lengths(weight, torch.zeros(R, K), torch.zeros(3, R)) > 0).all()


@pytest.mark.parametrize("left", [0.02, 0.1])
def test_rows_that_are_nearly_cancelled_keep_their_length(left):
    """In bf16 the cross term would drown what is left."""
    a = torch.randn(R, K).bfloat16()
    b = torch.randn(N, R).bfloat16()
    weight = (-(1 - left) * (b.float() @ a.float())).bfloat16()
    truth = dora.reference(*(value.double() for value in (weight, a, b)))
    assert relative(dora.row_lengths(weight, a, b).double(), truth) < 1e-3
