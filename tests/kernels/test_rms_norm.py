"""rms_norm: the Triton kernels against fp64, wherever rows lie and whatever is written over what."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import rms_norm as kernels
from minitune.kernels.launch import Config
from minitune.ops import rms_norm as op
from tests.tolerance import check

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Narrow rows come several to a program, wide ones one; heads lie side by side, tokens apart.
SHAPES = {"several rows a program, ragged": (37, 100), "one row a program": (5, 4100), "odd heads": (9, 3, 10),
          "heads of 128": (6, 5, 128), "one value": (3, 1)}
TINY = Config({"TILE": 256}, num_warps=1)
"""Several programs, and rows of more than a tile, at small shapes."""


def _randn(shape, dtype, device):
    return torch.randn(shape, device=device).mul_(2).to(dtype)


def _apart(shape, dtype, device):
    """(a view whose tokens lie apart, the buffer around it): filled with NaN and with -7."""
    row = torch.Size(shape[1:]).numel()
    buffer = torch.full((shape[0], row + 13), -7.0, dtype=dtype, device=device)
    view = buffer[:, 5:5 + row].view(shape) if len(shape) == 2 else buffer[:, 5:5 + row].unflatten(1, shape[1:])
    return view.fill_(torch.nan), buffer


def _untouched(view, buffer):
    """Nothing around the view was written. The view is lost."""
    view.fill_(-7.0)
    return bool((buffer == -7.0).all())


def _weight(d, dtype, device):
    return torch.rand(d, device=device).add_(0.5).to(dtype)


def _rstd(x):
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def _check_forward(found, total, weight):
    y, rstd = found
    check("rstd", rstd, _rstd(total.float()), _rstd(total.double()))
    check("y", y, op.reference(total, weight, EPS), op.reference(total.double(), weight.double(), EPS))


@pytest.mark.parametrize("place", ["new", "apart", "in place"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, shape, residual, place, device):
    x, buffer = _apart(shape, dtype, device)
    given = x.copy_(_randn(shape, dtype, device)).clone()
    past = _randn(shape, dtype, device) if residual else None
    weight = _weight(shape[-1], dtype, device)
    out, around = _apart(shape, dtype, device) if place == "apart" else (x if place == "in place" else None, buffer)
    y, rstd, total = kernels.forward(x, weight, EPS, past, out=out)
    assert out is None or y is out
    expected = given if past is None else given + past
    assert total is None if past is None else torch.equal(total, expected)
    _check_forward((y, rstd), expected, weight)
    assert torch.equal(kernels.apply(expected, rstd, weight), y)
    assert place == "in place" or torch.equal(x, given)
    assert _untouched(x if out is None else out, around)


@pytest.mark.parametrize("shape", [(11, 100), (2, 1000), (3, 3, 10)], ids=str)
def test_small_tiles(shape, device):
    """Many programs and a last one that is not full; a row of several warps."""
    x, past, dy = (_randn(shape, torch.float32, device) for _ in range(3))
    weight = _weight(shape[-1], torch.float32, device)
    out = torch.full_like(x, torch.nan)
    y, rstd, total = kernels.forward(x, weight, EPS, past, out=out, config=TINY)
    _check_forward((y, rstd), total, weight)
    assert torch.equal(kernels.apply(total, rstd, weight, config=TINY), y)
    dx = kernels.backward(dy, total, rstd, weight, past, out=out.fill_(torch.nan), config=TINY)
    _check_backward(dx, dy, total, weight, past)


@pytest.mark.parametrize("apart", [False, True], ids=["new", "apart"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("rows", "d", "rank"), [(37, 100, 5), (130, 64, 48), (1, 33, 1), (70, 128, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_the_thin_product(dtype, rows, d, rank, residual, apart, device):
    x, past = _apart((rows, d), dtype, device)[0].copy_(_randn((rows, d), dtype, device)), None
    if residual:
        past = _apart((rows, d), dtype, device)[0].copy_(_randn((rows, d), dtype, device))
    given, weight, a = x.clone(), _weight(d, dtype, device), _randn((rank, d), dtype, device) * d**-0.5
    out, around = _apart((rows, d), dtype, device) if apart else (None, None)
    y, rstd, total, s = kernels.forward_s(x, weight, EPS, past, a, out=out)
    assert out is None or y is out
    expected = given if past is None else given + past
    assert total is None if past is None else torch.equal(total, expected)
    _check_forward((y, rstd), expected, weight)
    assert torch.equal(kernels.apply(expected, rstd, weight), y)        # what a backward makes again of it
    check("s", s, y @ a.mT, y.double() @ a.double().mT)
    assert torch.equal(x, given) and (out is None or _untouched(out, around))


def test_no_rows_have_a_thin_product_too(device):
    y, rstd, total, s = kernels.forward_s(*(torch.empty(size, device=device) for size in ((0, 8), 8)), EPS, None,
                                          torch.empty(3, 8, device=device))
    assert (y.shape, rstd.shape, total, s.shape) == ((0, 8), (0, 1), None, (0, 3))


def test_a_weight_of_another_dtype(device):
    x, weight = _randn((4, 100), torch.bfloat16, device), _weight(100, torch.float32, device)
    y, _, _ = kernels.forward(x, weight, EPS)
    check("y", y, op.reference(x, weight, EPS), op.reference(x.double(), weight.double(), EPS))


@pytest.mark.parametrize(("config", "programs"), [(None, 512), (TINY, 3)], ids=["default", "small tiles, 3 programs"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_trained_weight(dtype, shape, programs, config, device, monkeypatch):
    """However many programs share the rows; of tokens that lie apart."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    dy, x = (_apart(shape, dtype, device)[0].copy_(_randn(shape, dtype, device)) for _ in range(2))
    rstd = _rstd(x.float())
    found = kernels.backward_weight(dy, x, rstd, config=config)
    assert found.dtype == torch.float32 and torch.equal(found, kernels.backward_weight(dy, x, rstd, config=config))

    def plain(kind):
        weight = torch.ones(shape[-1], dtype=kind, device=device).requires_grad_()
        return torch.autograd.grad(op.reference(x.to(kind), weight, EPS), weight, dy.to(kind))[0]

    check("d weight", found, plain(torch.float32), plain(torch.float64))


def _check_backward(dx, dy, x, weight, past):
    def gradient(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        op.reference(leaf, weight.to(dtype), EPS).backward(dy.to(dtype))
        return leaf.grad if past is None else leaf.grad + past.to(dtype)

    check("dx", dx, gradient(x.dtype), gradient(torch.float64))


@pytest.mark.parametrize("place", ["new", "apart", "dy", "residual", "x"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward(dtype, shape, residual, place, device):
    operands = {name: _apart(shape, dtype, device) for name in ("dy", "x", "residual", "apart")}
    dy, x, past = (operands[name][0].copy_(_randn(shape, dtype, device)) for name in ("dy", "x", "residual"))
    given = {"dy": dy.clone(), "x": x.clone(), "residual": past.clone()}
    weight = _weight(shape[-1], dtype, device)
    rstd = _rstd(x.float())
    out = None if place == "new" else operands[place][0]
    dx = kernels.backward(dy, x, rstd, weight, past if residual else None, out=out)
    assert out is None or dx is out
    _check_backward(dx, given["dy"], given["x"], weight, given["residual"] if residual else None)
    for name, tensor in (("dy", dy), ("x", x), ("residual", past)):
        assert tensor is out or torch.equal(tensor, given[name]), f"{name} was written"
    assert out is None or _untouched(*operands[place])
