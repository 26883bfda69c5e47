"""rms_norm: forward and backward against fp64, as [T, d] and per head as [T, heads, d]."""

import pytest
import torch

from minitune.ops import rms_norm
from tests.tolerance import check

EPS = 1e-5


def _truth(x, weight, dy, dtype):
    x = x.to(dtype, copy=True).requires_grad_()
    y = rms_norm.reference(x, weight.to(dtype), EPS)
    (dx,) = torch.autograd.grad(y, x, dy.to(dtype))
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 123), (19, 5, 30)], ids=["rows", "heads"])
def test_forward_and_backward(shape, dtype):
    x, dy, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype) + 0.5
    y, rstd = rms_norm.forward(x, weight, EPS)
    truth, plain = _truth(x, weight, dy, torch.float64), _truth(x, weight, dy, dtype)
    check("y", y, plain[0], truth[0])
    assert torch.equal(rms_norm.apply(x, rstd, weight), y)
    check("dx", rms_norm.backward(dy, x, rstd, weight), plain[1], truth[1])


def test_differentiable_in_x_and_in_a_trained_weight():
    x, weight = torch.randn(7, 12, requires_grad=True), torch.rand(12)
    frozen = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).square().sum(), x)[0]
    weight.requires_grad_()
    dx, dw = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).square().sum(), (x, weight))
    assert torch.allclose(frozen, dx, rtol=1e-5, atol=1e-6)
    assert dw.abs().min() > 0


def test_reference_gradcheck():
    x, weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm.reference(x, weight, EPS), x)
    assert torch.autograd.gradcheck(lambda x: rms_norm.rms_norm(x, weight, EPS), x)
