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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_head_gets_its_gradient(dtype, smoothing, monkeypatch):
    """Of a weight in fp32, in chunks of tokens and of the vocabulary of which the last is smaller; and the hidden
    states' as well, or not."""
    monkeypatch.setitem(lce.CHUNK_BYTES, "cpu", 16 * 4 * 50)
    monkeypatch.setattr(lce, "VOCABULARY", 16)
    hidden, weight = torch.randn(37, 12).to(dtype), torch.randn(50, 12)
    labels, upstream = torch.randint(0, 50, (37,)), torch.randn(37)

    def plain(kind):
        wide = torch.promote_types(kind, torch.float32)
        leaves = hidden.to(kind, copy=True).requires_grad_(), weight.to(wide, copy=True).requires_grad_()
        losses = lce.reference(leaves[0], leaves[1].to(kind), labels, smoothing)
        return losses.detach(), *torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = lce.linear_cross_entropy(*leaves, labels, smoothing)
    found = losses.detach(), *torch.autograd.grad(losses, leaves, upstream)
    assert found[2].dtype == torch.float32
    for what, value, p, truth in zip(("losses", "d hidden", "d weight"), found, plain(dtype), plain(torch.float64),
                                     strict=True):
        check(what, value, p, truth)
    alone = lce.linear_cross_entropy(hidden, leaves[1], labels, smoothing)
    assert torch.equal(torch.autograd.grad(alone, leaves[1], upstream)[0], found[2])


def test_a_token_without_weight_changes_nothing():
    """A loss whose weight is 0 gives the head's gradient nothing, and its hidden state zeros."""
    hidden, weight = torch.randn(9, 12, requires_grad=True), torch.randn(50, 12, requires_grad=True)
    labels, upstream = torch.randint(0, 50, (9,)), torch.arange(9).ge(4).float()
    dx, dw = torch.autograd.grad(lce.linear_cross_entropy(hidden, weight, labels), (hidden, weight), upstream)
    rest = hidden[4:].detach().requires_grad_()
    dx_rest, dw_rest = torch.autograd.grad(lce.linear_cross_entropy(rest, weight, labels[4:]), (rest, weight),
                                           upstream[4:])
    assert not dx[:4].any() and relative(dx[4:], dx_rest) < 1e-6 and relative(dw, dw_rest) < 1e-6


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
