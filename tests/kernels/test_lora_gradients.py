"""lora_gradients: the Triton kernel gives the bits of the reference, wherever an adapter's rows and ranks lie."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import lora_gradients as kernels
from minitune.kernels.launch import Config
from minitune.ops import backends, lora_gradients

SMALL = Config({"TILE": 64}, num_warps=1)
# (r of the part, ranks before it, n, rows before it, K)
SHAPES = {"whole tiles": (16, 0, 32, 0, 64), "divides nothing": (3, 5, 29, 11, 37), "one of each": (1, 0, 1, 0, 1),
          "a rank as wide as a tile": (64, 8, 5, 2, 8)}


@pytest.mark.parametrize("turned", [True, False], ids=["db transposed", "db as it is"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_adapter_gets_its_own(dtype, shape, turned, device):
    rank, before, n, first, columns = shape
    ranks, rows = slice(before, before + rank), slice(first, first + n)
    da = torch.randn(before + rank + 2, columns, device=device).to(dtype)
    db = torch.randn(first + n + 3, before + rank + 2, device=device).to(dtype)
    db = db.mT.contiguous().mT if turned else db
    expected = lora_gradients.reference(da[ranks], db[rows, ranks], 0.37)
    found = kernels.apart(da[ranks], db[rows, ranks], 0.37, config=SMALL)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found)
    assert all(map(torch.equal, found, expected))
    with backends.use("triton"):
        assert all(map(torch.equal, lora_gradients.apart(da[ranks], db[rows, ranks], 0.37), expected))
