"""rope: the Triton kernel that rotates views in place, against fp64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import rope as kernels
from minitune.kernels.launch import Config
from minitune.ops import backends
from minitune.ops import rope as op
from tests.tolerance import check, relative

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Heads come 8 at a time, tokens as many as fill a tile.
SHAPES = {"ragged": (37, 3, 10), "two chunks, the last not full": (5, 11, 80), "one token a program": (3, 8, 256),
          "one head": (19, 1, 64), "one pair": (4, 2, 2)}


def _view(shape, dtype, device):
    """(heads in the middle of a buffer's rows, the buffer around them): filled with numbers and with -7."""
    tokens, heads, head_dim = shape
    buffer = torch.full((tokens, heads * head_dim + 13), -7.0, dtype=dtype, device=device)
    view = buffer[:, 5:5 + heads * head_dim].unflatten(1, (heads, head_dim))
    return view.copy_(torch.randn(shape, device=device)), buffer


def _tables(tokens, half, device):
    angles = torch.rand(tokens, half, device=device) * 6
    return angles.cos() * 1.1, angles.sin() * 1.1      # 1.1: yarn's factor, so no test takes cos² + sin² for 1


@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate(dtype, shape, back, device):
    x, around = _view(shape, dtype, device)
    cos, sin = _tables(shape[0], shape[2] // 2, device)
    given = x.clone()
    assert kernels.rotate_(x, cos, sin, back=back) is x
    truth = op.reference(given.double(), cos.double(), -sin.double() if back else sin.double())
    check("x", x, op.reference(given, cos, -sin if back else sin), truth)
    x.fill_(-7.0)
    assert bool((around == -7.0).all()), "values around the heads were written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_back_undoes_forth(dtype, device):
    x, _ = _view((6, 3, 80), dtype, device)
    given = x.clone()
    cos, sin = (table / 1.1 for table in _tables(6, 40, device))
    kernels.rotate_(x, cos, sin)
    assert relative(x, given) > 0.5
    kernels.rotate_(x, cos, sin, back=True)
    assert relative(x, given) < 2 * torch.finfo(dtype).eps


def test_small_tiles(device):
    x, _ = _view((7, 5, 10), torch.float32, device)
    cos, sin = _tables(7, 5, device)
    given = x.clone()
    kernels.rotate_(x, cos, sin, config=Config({"TILE": 32, "CHUNK": 2}, num_warps=1))
    check("x", x, op.reference(given, cos, sin), op.reference(given.double(), cos.double(), sin.double()))


@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("shape", [(37, 3, 1, 10), (4, 11, 2, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_join_moves_and_turns_in_one_pass(dtype, shape, back, device):
    tokens, heads, kv_heads, head_dim = shape
    q, k, v = (_view((tokens, n, head_dim), dtype, device)[0] for n in (heads, kv_heads, kv_heads))
    out, around = _view((tokens, heads + 2 * kv_heads, head_dim), dtype, device)
    cos, sin = _tables(tokens, head_dim // 2, device)
    assert kernels.join(q, k, v, cos, sin, out, back=back) is out
    expected = torch.cat((q, k, v), 1)
    kernels.rotate_(expected[:, :heads + kv_heads], cos, sin, back=back)
    assert torch.equal(out, expected)
    with backends.use("reference"):
        joined = op.join(q, k, v, cos, sin, torch.full_like(expected, torch.nan), back=back)
        assert torch.equal(joined[:, heads + kv_heads:], v) and relative(joined, expected) < 1e-2
    out.fill_(-7.0)
    assert bool((around == -7.0).all()), "values around the heads were written"
