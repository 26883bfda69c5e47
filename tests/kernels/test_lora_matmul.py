"""lora_matmul: the Triton kernels against plain PyTorch in the same dtype and a truth in fp64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import lora_matmul as kernels
from minitune.kernels.launch import Config
from tests import tolerance

DTYPES = [torch.float32, torch.bfloat16]
# (T, K, N, R); 0 = no adapter. A rank that is no multiple of 8 takes its own loop behind the main one.
SHAPES = {"whole tiles, rank in the main loop": (96, 64, 64, 16), "divides nothing, rank behind it": (45, 77, 51, 3),
          "divides nothing, several steps of rank": (33, 50, 70, 48), "no adapter": (40, 64, 33, 0),
          "one token": (1, 40, 24, 8), "one step": (19, 5, 7, 20)}
PRODUCT = Config({"BT": 32, "BN": 32, "BK": 32, "GROUP": 2}, 4, 2)
ADAPTERS = Config({"BC": 32, "BR": 32, "BT": 16}, 4, 2)


@pytest.fixture(autouse=True)
def _poisoned():
    """What a launcher allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _random(device, dtype, *shapes, pitched=0):
    """One tensor for each shape; the first ``pitched`` of them with NaN between their rows."""
    torch.manual_seed(sum(map(sum, shapes)))
    found = []
    for index, (rows, columns) in enumerate(shapes):
        gap = 16 if index < pitched else 0
        buffer = torch.full((rows, columns + gap), torch.nan, dtype=dtype)
        buffer[:, :columns] = torch.randn(rows, columns)
        found.append(buffer.to(device)[:, :columns])
    return found


def _nan(device, dtype, *shape):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _check(name, value, compute, *operands, dtype=None):
    """``compute`` on the operands is plain PyTorch, on their fp64 images the truth. Without pitch: a library product
    of bf16 on a CPU reads what lies between the rows."""
    plain = compute(*(x.contiguous() if dtype is None else x.to(dtype) for x in operands))
    tolerance.check(name, value, plain, compute(*(x.double() for x in operands)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(shape, dtype, device):
    """fp32 contiguous, bf16 with rows that lie apart; a bias where T is odd."""
    tokens, depth, width, rank = shape
    pitched = dtype == torch.bfloat16
    x, weight, bias, *low = _random(device, dtype, (tokens, depth), (width, depth), (1, width),
                                    *([(tokens, rank), (width, rank)] if rank else []), pitched=2 * pitched)
    s, b = low or (None, None)
    bias = bias[0] if tokens % 2 else None
    out = _nan(device, dtype, tokens, width + 16)
    y = kernels.forward(x, weight, s, b, bias, out=out[:, :width], config=PRODUCT)
    assert bool(out[:, width:].isnan().all()), "values between the rows were written"

    def compute(x, weight, *rest):
        y = x @ weight.mT + (rest[0] @ rest[1].mT if rank else 0)
        return y if bias is None else y + rest[-1]
    _check("y", y, compute, x, weight, *low, *([] if bias is None else [bias]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_input(shape, dtype, device):
    """fp32 contiguous, bf16 with rows that lie apart."""
    tokens, depth, width, rank = shape
    pitched = dtype == torch.bfloat16
    dy, weight, *low = _random(device, dtype, (tokens, width), (width, depth),
                               *([(tokens, rank), (rank, depth)] if rank else []), pitched=2 * pitched)
    ds, a = low or (None, None)
    out = _nan(device, dtype, tokens, depth)
    dx = kernels.backward_input(dy, weight, ds, a, out=out, config=PRODUCT)
    assert dx is out
    _check("dx", dx, lambda dy, weight, *low: dy @ weight + (low[0] @ low[1] if low else 0), dy, weight, *low)


@pytest.fixture
def small_gpu(monkeypatch):
    """Splits at sizes that the interpreter can bear."""
    monkeypatch.setattr(kernels, "ENOUGH", 5)
    monkeypatch.setattr(kernels, "FULL", 12)
    monkeypatch.setattr(kernels, "LEAST_STEPS", 2)


# (T, N, K, R): fewer than 5 tiles of 32 columns and 32 of the rank split T.
ADAPTER_SHAPES = {"whole tiles": (64, 160, 192, 16), "divides nothing": (37, 165, 170, 3),
                  "T in parts, several tiles of rank": (110, 33, 64, 48), "one slice, one token": (1, 20, 24, 8)}


@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("shape", ADAPTER_SHAPES.values(), ids=ADAPTER_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_adapters(shape, dtype, device):
    tokens, width, depth, rank = shape
    dy, x, s, ds = _random(device, dtype, (tokens, width), (tokens, depth), (tokens, rank), (tokens, rank), pitched=2)
    found = kernels.backward_adapters(dy, x, s, ds, config=ADAPTERS)
    for name, value, left, right in (("dA", found[0], ds, x), ("dB", found[1], dy, s)):
        _check(name, value, lambda left, right: left.mT @ right, left, right, dtype=torch.float32)
    again = kernels.backward_adapters(dy, x, s, ds, config=ADAPTERS)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [16, 100], ids=["narrow", "wide"])
def test_default_configurations(rank, dtype, device):
    """A training step's calls and their sums, as they are launched; the product twice, to the bit."""
    tokens, depth, width = 70, 144, 112      # whole 16-byte reads, part of a tile
    x, weight, a, b, dy = _random(device, dtype, (tokens, depth), (width, depth), (rank, depth), (width, rank),
                                  (tokens, width))
    s, ds = x @ a.mT, dy @ b
    y, dx = kernels.forward(x, weight, s, b, None), kernels.backward_input(dy, weight, ds, a)
    _check("y", y, lambda x, weight, s, b: x @ weight.mT + s @ b.mT, x, weight, s, b)
    _check("dx", dx, lambda dy, weight, ds, a: dy @ weight + ds @ a, dy, weight, ds, a)
    assert torch.equal(y, kernels.forward(x, weight, s, b, None))
    assert torch.equal(dx, kernels.backward_input(dy, weight, ds, a))
    da, db = kernels.backward_adapters(dy, x, s, ds)
    _check("dA", da, lambda ds, x: ds.mT @ x, ds, x, dtype=torch.float32)
    _check("dB", db, lambda dy, s: dy.mT @ s, dy, s, dtype=torch.float32)


def test_no_tokens(device):
    x, dy, s, weight, b = _random(device, torch.float32, (0, 24), (0, 40), (0, 8), (40, 24), (40, 8))
    assert kernels.forward(x, weight, s, b, None).shape == (0, 40)
    assert kernels.backward_input(dy, weight, None, None).shape == (0, 24)
    assert [g.count_nonzero().item() for g in kernels.backward_adapters(dy, x, s, s)] == [0, 0]


def test_rows_behind_two_to_the_31_elements(device):
    """Only the pages that hold a row are touched."""
    torch.use_deterministic_algorithms(False)
    pitch, tokens, dtype = 1 << 26, 40, torch.bfloat16
    x, weight, square, s = _random(device, dtype, (tokens, 32), (16, 32), (32, 16), (tokens, 8))
    apart = torch.empty(pitch * (tokens - 1) + 32, dtype=dtype, device=device).as_strided((tokens, 32), (pitch, 1))
    apart.copy_(x)
    product = Config({"BT": 16, "BN": 16, "BK": 32, "GROUP": 1}, 4, 2)
    for found, expected in zip(*((
            kernels.forward(x, weight, None, None, None, config=product),
            kernels.backward_input(x, square, None, None, config=product),
            *kernels.backward_adapters(x, x, s, s, config=ADAPTERS)) for x in (apart, x)), strict=True):
        assert torch.equal(found, expected)
