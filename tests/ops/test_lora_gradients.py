"""lora_gradients: an adapter's share of its projection's gradients is cast, and B's scaled; by PyTorch here."""

import pytest
import torch

from minitune.ops import lora_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_values_are_the_references(dtype):
    da, db = torch.randn(6, 11).to(dtype), torch.randn(6, 9).to(dtype).mT
    ranks, rows = slice(2, 5), slice(1, 8)
    expected = lora_gradients.reference(da[ranks].clone(), db[rows, ranks].clone(), 2.5)
    found = lora_gradients.apart(da[ranks], db[rows, ranks], 2.5)
    assert all(map(torch.equal, found, expected))
    assert {x.dtype for x in found} == {torch.promote_types(dtype, torch.float32)}
