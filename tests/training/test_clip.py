"""Clipping: the norm, the factor, and gradients of which no factor makes a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minitune.training import flat
from minitune.training.clip import clip_gradients, global_norm
from minitune.training.optimizers import SGD, AdamW, clip_grad_norm


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1), lambda p: AdamW(p, lr=0.1, moments="8bit"),
                                  lambda p: SGD(p, lr=0.1, momentum=0.9)], ids=["adamw", "adamw 8bit", "sgd"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(("gradient", "loss"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_after_clip_a_step_that_is_not_finite_changes_nothing(make, max_norm, gradient, loss):
    small, large = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(flat.WHOLE))
    optimizer = make([small, large])
    optimizer.zero_grad()
    (small.sum() + large.sum()).backward()
    optimizer.step()
    before = [p.detach().clone() for p in (small, large)], copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    (small.sum() + large.sum()).backward()
    small.grad[7] = gradient
    optimizer.clip(max_norm, torch.tensor(loss))
    optimizer.step()
    assert torch.equal(small, before[0][0]) and torch.equal(large, before[0][1])
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][i][name]) for name, value in state.items() if name != "step")


def test_clip_scales_once_and_zero_grad_forgets_it():
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    one, two = SGD([a], lr=1.0), SGD([b], lr=1.0)
    a.grad = torch.full((4,), 2.0)
    assert one.clip(1.0).item() == pytest.approx(4.0)
    one.step()
    assert a.norm().item() == pytest.approx(1.0, rel=1e-5)
    a.grad.fill_(2.0)
    one.step()  # not clipped again
    assert a.norm().item() == pytest.approx(5.0, rel=1e-5)
    b.grad = torch.full((4,), 2.0)
    two.clip(1.0)
    two.zero_grad()
    b.grad = torch.full((4,), 2.0)
    two.step()
    assert b.norm().item() == pytest.approx(4.0)


def test_the_factor_of_a_tiny_norm_is_torchs():
    ours, theirs = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    ours.grad, theirs.grad = torch.full((4,), 1e-6), torch.full((4,), 1e-6)
    clip_grad_norm([ours], 1e-6)
    nn.utils.clip_grad_norm_([theirs], 1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


def test_global_norm_is_exact_where_one_fp32_sum_is_not():
    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) * 0.01
    truth = x.double().norm().item()
    assert abs(global_norm([x[:1_000_003], x[1_000_003:]]).item() - truth) / truth < 2e-7
    assert global_norm([]).item() == 0
    assert global_norm([torch.tensor([3.0, float("inf")])]).item() == float("inf")


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradients_of_another_optimizer_become_zero_where_nobody_can_be_asked(monkeypatch, max_norm):
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, float("inf"), float("nan")])
    monkeypatch.setattr("minitune.training.clip.asks", lambda device: False)
    clip_gradients([weight], max_norm, torch.tensor(1.0))
    assert weight.grad.tolist() == [0, 0, 0]
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    clip_gradients([weight], max_norm, torch.tensor(float("nan")))
    assert weight.grad.tolist() == [0, 0, 0]
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    clip_gradients([weight], max_norm, torch.tensor(1.0))
    assert weight.grad.norm().item() == pytest.approx(max_norm or 5.0, rel=1e-5)
