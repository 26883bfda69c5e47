"""rms_norm: forward and backward against fp64, as [T, d] and per head as [T, heads, d]."""

import pytest
import torch

from minitune.ops import backends, rms_norm
from tests.tolerance import check

EPS = 1e-5


def _truth(x, weight, dy, dtype):
    x, weight = x.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
    y = rms_norm.reference(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 123), (19, 5, 30)], ids=["rows", "heads"])
def test_forward_and_backward(shape, dtype):
    x, dy, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype) + 0.5
    y, rstd, total = rms_norm.forward(x, weight, EPS)
    assert total is x
    truth, plain = _truth(x, weight, dy, torch.float64), _truth(x, weight, dy, dtype)
    check("y", y, plain[0], truth[0])
    assert torch.equal(rms_norm.apply(x, rstd, weight), y)
    check("dx", rms_norm.backward(dy, x, rstd, weight), plain[1], truth[1])
    d_weight = rms_norm.backward_weight(dy, x, rstd)
    assert d_weight.dtype == torch.float32
    check("d weight", d_weight.to(dtype), plain[2], truth[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_before_and_the_gradient_past_it(dtype):
    x, branch, dy, past = (torch.randn(37, 123).to(dtype) for _ in range(4))
    weight = torch.rand(123).to(dtype) + 0.5
    y, rstd, total = rms_norm.forward(x, weight, EPS, branch)
    assert torch.equal(total, x + branch) and torch.equal(y, rms_norm.forward(total, weight, EPS)[0])
    truth, plain = _truth(total, weight, dy, torch.float64)[1], _truth(total, weight, dy, dtype)[1]
    gradient = dy.clone()
    assert rms_norm.backward(gradient, total, rstd, weight, past, out=gradient) is gradient
    check("dx", gradient, plain + past, truth + past.double())


def test_the_norm_may_take_the_place_of_its_input():
    wide = torch.randn(11, 5, 12)
    part, expected = wide[:, 1:4], wide.clone()
    expected[:, 1:4] = rms_norm.forward(part.clone(), torch.ones(12), EPS)[0]
    assert rms_norm.forward(part, torch.ones(12), EPS, out=part)[0] is part
    assert torch.equal(wide, expected)


def test_both_summands_get_the_gradient():
    x, branch = (torch.randn(7, 12, requires_grad=True) for _ in range(2))
    dx, d_branch = torch.autograd.grad(rms_norm.rms_norm(x, torch.rand(12), EPS, branch).square().sum(), (x, branch))
    assert torch.equal(dx, d_branch) and dx.abs().min() > 0


def test_differentiable_in_x_and_in_a_trained_weight():
    x, weight = torch.randn(7, 12, requires_grad=True), torch.rand(12)
    frozen = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).square().sum(), x)[0]
    weight.requires_grad_()
    dx, dw = torch.autograd.grad(rms_norm.rms_norm(x, weight, EPS).square().sum(), (x, weight))
    assert torch.allclose(frozen, dx, rtol=1e-5, atol=1e-6)
    assert dw.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_weight_stays_in_fp32(dtype):
    """It is cast for use, and gets its gradient in fp32."""
    x, weight = torch.randn(7, 12).to(dtype), (torch.rand(12) + 0.5).requires_grad_()
    y = rms_norm.rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    truth = weight.detach().double().requires_grad_()
    rms_norm.reference(x.double(), truth, EPS).square().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - truth.grad).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * truth.grad.norm()


def test_reference_gradcheck():
    x, weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.rand(6, dtype=torch.float64)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm.reference(x, weight, EPS), x)
    assert torch.autograd.gradcheck(lambda x: rms_norm.rms_norm(x, weight, EPS), x)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_that_is_one_value_expanded(backend):
    """Of a sum over hidden states."""
    if backends.missing(backend, torch.device("cpu")):
        pytest.skip(backends.missing(backend, torch.device("cpu")))
    x, weight = torch.randn(6, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    with backends.use(backend):
        found = torch.autograd.grad(rms_norm.rms_norm(x, weight, 1e-5).sum(), (x, weight))
        expected = torch.autograd.grad((rms_norm.rms_norm(x, weight, 1e-5) * torch.ones(6, 8)).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
