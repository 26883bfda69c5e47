"""sgd: the Triton kernel against the reference over several steps, at every length, momentum and kind of step."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import sgd as kernels
from minitune.kernels.launch import Config
from minitune.ops import backends
from minitune.ops import sgd as op
from tests.tolerance import relative

SMALL = Config({"TILE": 256}, num_warps=1)
SIZES = {"one value": 1, "ragged": 777, "several tiles": 1024}
KINDS = {"plain": (0.0, False), "momentum": (0.9, False), "nesterov": (0.9, True)}


def _run(step_op, n, device, kind, steps=4, scale=None, **more):
    """param, grad, momentum_buffer after some steps, on the CPU. What lies in the buffer first must not be read."""
    momentum, nesterov = kind
    param, grad = (torch.randn(n, generator=torch.Generator().manual_seed(9)).to(device) for _ in range(2))
    buffer = torch.full((n,), math.nan, device=device)
    for step in range(steps):
        grad.copy_(torch.randn(n, generator=torch.Generator().manual_seed(step)))
        step_op(param, grad, buffer, lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=0.1, first=step == 0,
                grad_scale=scale if scale is None else scale.to(device), **more)
    return [t.cpu() for t in (param, grad, buffer)]


@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.37)], ids=["as it is", "scaled"])
def test_four_steps_follow_the_reference(n, kind, scale, device):
    found = _run(kernels.sgd_, n, device, kind, scale=scale, config=SMALL)
    expected = _run(op.sgd_reference_, n, "cpu", kind, scale=scale)
    assert relative(found[0], expected[0]) <= 1e-6
    assert torch.equal(found[1], expected[1])
    if kind[0]:
        assert relative(found[2], expected[2]) <= 1e-6
    else:
        assert bool(found[2].isnan().all()), "without momentum its buffer is not written"


def test_is_bitwise_repeatable_and_blind_to_cuts_and_tiles(device):
    kernel = kernels.sgd_

    def cut(*buffers, **settings):
        for part in (slice(0, 48), slice(48, 1024), slice(1024, None)):
            kernel(*(b[part] for b in buffers), **settings)

    whole, again, parts = (_run(step_op, 2500, device, (0.9, True), **more)
                           for step_op, more in ((kernel, {}), (kernel, {"config": SMALL}), (cut, {})))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, again, parts, strict=True))


def test_nothing_is_written_beyond_the_end(device):
    buffers = [torch.full((300,), -7.0, device=device) for _ in range(3)]
    kernels.sgd_(*(b[:130] for b in buffers), lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0,
                                first=False, grad_scale=torch.tensor(0.5, device=device))
    assert all(bool((b[130:] == -7.0).all() and (b[:130] != -7.0).all()) for b in buffers)


@pytest.mark.parametrize("first", [True, False])
def test_a_scale_that_is_nan_takes_no_step(first, device):
    param, grad, buffer = (torch.full((300,), -7.0, device=device) for _ in range(3))
    kernels.sgd_(param, grad, buffer, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, first=first,
                 grad_scale=torch.tensor(math.nan, device=device))
    assert bool((param == -7).all() and (buffer == -7).all() and grad.isnan().all())


def test_the_public_op_takes_the_kernel_where_it_is_asked_for(device):
    with backends.use("triton"):
        found = _run(op.sgd_, 500, device, (0.9, True))
    assert torch.equal(found[0], _run(kernels.sgd_, 500, device, (0.9, True))[0])
