"""sgd_: against torch.optim.SGD with the decay taken outside, against its own reference, repeatable, and refusing."""

from __future__ import annotations

import pytest
import torch

from minitune.errors import InputError
from minitune.ops.sgd import sgd_, sgd_reference_

BOTH = pytest.mark.parametrize("op", [sgd_, sgd_reference_])


def gradient(n: int, step: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(step))


@BOTH
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_twenty_steps_follow_torch(op, momentum, nesterov, weight_decay):
    n, lr = 1237, 0.02
    ours = gradient(n, 999)
    theirs = torch.nn.Parameter(ours.clone())
    buffer = torch.full((n,), float("nan")) if momentum else None  # what lies there first must not be read
    optimizer = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=nesterov, foreach=False)
    for step in range(20):
        op(ours, gradient(n, step), buffer, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
           first=step == 0)
        theirs.data.mul_(1 - lr * weight_decay)
        theirs.grad = gradient(n, step)
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=5e-7)
    if buffer is not None:
        torch.testing.assert_close(buffer, optimizer.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-6)


@BOTH
def test_is_bitwise_repeatable_and_scales_the_gradient(op):
    def run(scale: torch.Tensor | None, factor: float) -> torch.Tensor:
        p, buffer = gradient(333, 7), torch.zeros(333)
        for step in range(4):
            op(p, gradient(333, step) * factor, buffer, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01,
               first=step == 0, grad_scale=scale)
        return p

    assert torch.equal(run(None, 0.25), run(None, 0.25))
    assert torch.equal(run(torch.tensor(0.25), 1.0), run(None, 0.25))
    assert not torch.equal(run(None, 1.0), run(None, 0.25))


@BOTH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_scale_that_is_nan_takes_no_step(op, momentum, weight_decay):
    p, grad, buffer = gradient(333, 7), gradient(333, 8), gradient(333, 9)
    before = [p.clone(), buffer.clone()]
    op(p, grad, buffer, lr=0.1, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay, first=False,
       grad_scale=torch.tensor(float("nan")))
    assert torch.equal(p, before[0]) and torch.equal(buffer, before[1]) and bool(grad.isnan().all())


@BOTH
def test_refuses_what_it_cannot_do(op):
    p, g = torch.zeros(8), torch.zeros(8)
    with pytest.raises(InputError, match="momentum_buffer is None"):
        op(p, g, None, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, first=True)
    with pytest.raises(InputError, match="nesterov needs"):
        op(p, g, None, lr=0.1, momentum=0.0, nesterov=True, weight_decay=0.0, first=True)
    with pytest.raises(InputError, match=r"grad is torch\.float64"):
        op(p, g.double(), None, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, first=True)
    with pytest.raises(InputError, match=r"grad_scale is torch\.float64 \[\].*must be a torch\.float32"):
        op(p, g, None, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, first=True,
           grad_scale=torch.tensor(0.5).double())
