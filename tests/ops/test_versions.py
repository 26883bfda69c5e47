"""written: autograd notices what the extension's and Triton's kernels write in place."""

import pytest
import torch

from minitune.ops import adamw, linear_cross_entropy, moments8, rms_norm, rope, swiglu


def _squared(x):
    """A graph that has saved x."""
    return x.square().sum() if x.requires_grad else (x * torch.ones_like(x, requires_grad=True)).sum()


def _rope(x):
    rope.rotate_(x.view(6, 2, 8), torch.ones(6, 4), torch.zeros(6, 4))


def _norm(x):
    rms_norm.forward(torch.randn(6, 16), torch.ones(16), 1e-5, out=x)


def _norm_backward(x):
    y, rstd, total = rms_norm.forward(torch.randn(6, 16), torch.ones(16), 1e-5)
    rms_norm.backward(y, total, rstd, torch.ones(16), out=x)


def _swiglu(x):
    swiglu.forward(torch.randn(6, 32), out=x)


def _swiglu_backward(x):
    swiglu.backward(torch.randn(6, 8), x, overwrite=True)


def _losses(x):
    linear_cross_entropy.losses_(x, torch.zeros(6, dtype=torch.int64), torch.empty(6), 0.0, True)


def _adamw_8bit(x):
    moments = (moments8.zeros(x.numel(), signed, torch.device("cpu")) for signed in (True, False))
    adamw.adamw_8bit_(x.view(-1), torch.randn(x.numel()), *moments, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
                      weight_decay=0.0, step=1)


@pytest.mark.parametrize("write", [_rope, _norm, _norm_backward, _swiglu, _swiglu_backward, _losses, _adamw_8bit])
def test_a_tensor_that_a_backward_saved_may_not_be_written_unnoticed(write):
    x = torch.randn(6, 16)
    total = _squared(x)
    write(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
