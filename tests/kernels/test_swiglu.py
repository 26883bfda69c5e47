"""swiglu: the Triton kernels against fp64, wherever rows lie and whatever is written over what."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import swiglu as kernels
from minitune.kernels.launch import Config
from minitune.ops import swiglu as op
from tests.tolerance import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"a piece that is not full": (37, 70), "several pieces, the last not full": (3, 1030), "one column": (50, 1)}
TINY = Config({"BLOCK": 32}, num_warps=1)


def _apart(tokens, columns, dtype, device):
    """(a view whose rows lie apart, the buffer around it): filled with NaN and with -7."""
    buffer = torch.full((tokens, columns + 13), -7.0, dtype=dtype, device=device)
    view = buffer[:, 5:5 + columns]
    return view.fill_(torch.nan), buffer


def _randn_apart(tokens, columns, dtype, device):
    view, buffer = _apart(tokens, columns, dtype, device)
    return view.copy_(torch.randn(view.shape, device=device).mul_(2)), buffer


def _untouched(view, buffer):
    """Nothing around the view was written. The view is lost."""
    view.fill_(-7.0)
    return bool((buffer == -7.0).all())


def _check_gradient(found, dh, gate_up):
    def gradient(dtype):
        leaf = gate_up.to(dtype, copy=True).requires_grad_()
        op.reference(leaf).backward(dh.to(dtype))
        return leaf.grad

    check("gradient", found, gradient(gate_up.dtype), gradient(torch.float64))


@pytest.mark.parametrize("given", [False, True], ids=["new", "apart"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, shape, given, device):
    tokens, f = shape
    gate_up, _ = _randn_apart(tokens, 2 * f, dtype, device)
    out, around = _apart(tokens, f, dtype, device)
    h = kernels.forward(gate_up, out=out if given else None)
    assert h is out or not given
    check("h", h, op.reference(gate_up), op.reference(gate_up.double()))
    assert not given or _untouched(out, around)


@pytest.mark.parametrize("place", ["new", "apart", "gate_up"])
@pytest.mark.parametrize("h_place", [None, "apart", "dh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, shape, h_place, place, device):
    tokens, f = shape
    gate_up, dh = (_randn_apart(tokens, columns, dtype, device) for columns in (2 * f, f))
    gradient = {"new": (None, None), "apart": _apart(tokens, 2 * f, dtype, device), "gate_up": gate_up}[place]
    h = {None: (None, None), "apart": _apart(tokens, f, dtype, device), "dh": dh}[h_place]
    old_gate_up, old_dh = gate_up[0].clone(), dh[0].clone()
    found = kernels.backward(dh[0], gate_up[0], gradient=gradient[0], h=h[0])
    assert place == "new" or found is gradient[0]
    _check_gradient(found, old_dh, old_gate_up)
    if h_place:
        assert torch.equal(h[0], kernels.forward(old_gate_up)), "h has not the bits of forward"
    assert place == "gate_up" or torch.equal(gate_up[0], old_gate_up)
    assert h_place == "dh" or torch.equal(dh[0], old_dh)
    assert place == "new" or _untouched(*gradient)
    assert not h_place or _untouched(*h)


def test_small_pieces(device):
    gate_up, dh = torch.randn(3, 140, device=device), torch.randn(3, 70, device=device)
    h = kernels.forward(gate_up, out=torch.full_like(dh, torch.nan), config=TINY)
    check("h", h, op.reference(gate_up), op.reference(gate_up.double()))
    again = torch.full_like(dh, torch.nan)
    _check_gradient(kernels.backward(dh, gate_up, h=again, config=TINY), dh, gate_up)
    assert torch.equal(again, h)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_gates_far_from_zero(device):
    """exp(-gate) overflows or vanishes: silu is 0 or the gate, its slope 0 or 1."""
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]], device=device)
    gate_up = torch.cat((gate, torch.full_like(gate, 3.0)), dim=1)
    assert torch.allclose(kernels.forward(gate_up), 3 * gate.clamp_min(0))
    d_gate, d_up = kernels.backward(torch.ones_like(gate), gate_up).chunk(2, dim=1)
    assert torch.allclose(d_gate, 3.0 * (gate > 0)) and torch.allclose(d_up, gate.clamp_min(0))
