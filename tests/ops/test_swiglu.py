"""swiglu: forward and backward against fp64."""

import pytest
import torch

from minitune.ops import swiglu
from tests.tolerance import check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(dtype):
    gate_up, dh = (torch.randn(41, 2 * 51) * 3).to(dtype), torch.randn(41, 51).to(dtype)
    results = []
    for wide in (torch.float64, dtype):
        x = gate_up.to(wide).clone().requires_grad_()
        y = swiglu.reference(x)
        results.append((y.detach(), torch.autograd.grad(y, x, dh.to(wide))[0]))
    (truth, d_truth), (plain, d_plain) = results
    check("h", swiglu.forward(gate_up), plain, truth)
    gradient, nothing = swiglu.backward(dh.clone(), gate_up)
    check("d gate_up", gradient, d_plain, d_truth)
    again, h = swiglu.backward(dh.clone(), gate_up.clone(), want_h=True, overwrite=True)
    assert nothing is None and torch.equal(again, gradient) and torch.equal(h, swiglu.forward(gate_up))
