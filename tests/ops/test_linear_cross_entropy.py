"""linear_cross_entropy: chunked losses and gradients against fp64, with a frozen head and with a trained one."""

import pytest
import torch

from minitune.ops import linear_cross_entropy as lce
from tests.tolerance import check, relative


def _plain(hidden, weight, labels, upstream, dtype, smoothing=0.0):
    hidden = hidden.to(dtype).requires_grad_()
    losses = lce.reference(hidden, weight.to(dtype), labels, smoothing)
    return losses.detach(), torch.autograd.grad(losses, hidden, upstream.to(losses.dtype))[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_head(dtype, smoothing, monkeypatch):
    monkeypatch.setitem(lce.CHUNK_BYTES, "cpu", 20 * 4 * 301)      # 20 tokens: 53 divide into 20, 20 and 13
    hidden, weight = torch.randn(53, 36).to(dtype), (torch.randn(301, 36) / 3).to(dtype)
    labels, upstream = torch.randint(0, 301, (53,)), torch.randn(53)
    (truth, d_truth), (plain, d_plain) = (_plain(hidden, weight, labels, upstream, d, smoothing)
                                                for d in (torch.float64, dtype))
    x = hidden.requires_grad_()
    losses = lce.linear_cross_entropy(x, weight, labels, smoothing)
    check("losses", losses.detach(), plain, truth)
    check("d hidden", torch.autograd.grad(losses, x, upstream)[0], d_plain, d_truth)


def test_sure_predictions_keep_their_gradient_in_bf16():
    """p rounds to 1 in bf16; 1 - p must not become 0."""
    weight = torch.eye(16, dtype=torch.bfloat16)
    x = (torch.eye(16)[:4] * 9).to(torch.bfloat16).requires_grad_()
    (gradient,) = torch.autograd.grad(lce.linear_cross_entropy(x, weight, torch.arange(4)).sum(), x)
    exact = (torch.eye(16)[:4] * 9).double().softmax(-1) - torch.eye(16)[:4].double()
    assert relative(gradient, exact) < 1e-2


def test_trained_head_gets_its_gradient(monkeypatch):
    monkeypatch.setitem(lce.CHUNK_BYTES, "cpu", 16 * 4 * 50)
    hidden, weight = torch.randn(37, 12, requires_grad=True), torch.randn(50, 12, requires_grad=True)
    labels, upstream = torch.randint(0, 50, (37,)), torch.randn(37)
    for smoothing in (0.0, 0.2):
        expected = torch.autograd.grad(lce.reference(hidden, weight, labels, smoothing), (hidden, weight), upstream)
        found = torch.autograd.grad(lce.linear_cross_entropy(hidden, weight, labels, smoothing), (hidden, weight),
                                    upstream)
        for value, e in zip(found, expected, strict=True):
            assert relative(value, e) < 1e-6


def test_extreme_logits():
    """A label whose probability is no fp32 number any more still has its loss, and its gradient."""
    weight, x = torch.eye(8) * 300, torch.eye(8)[:2].requires_grad_()
    losses = lce.linear_cross_entropy(x, weight, torch.tensor([0, 5]))
    assert torch.allclose(losses.detach(), torch.tensor([0.0, 300.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert torch.allclose(gradient[1], torch.eye(8)[1] * 300 - torch.eye(8)[5] * 300)


def test_no_token_no_loss():
    x = torch.randn(0, 4, requires_grad=True)
    losses = lce.linear_cross_entropy(x, torch.randn(9, 4), torch.empty(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert x.grad.shape == (0, 4)
