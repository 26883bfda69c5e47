"""Buffers: where parameters and gradients lie, small ones end to end, large ones apart."""

from unittest import mock

import pytest
import torch
from torch import nn

import minitune as mt
from minitune.ops import linear_cross_entropy, lora_matmul
from minitune.training import flat
from minitune.training.optimizers import SGD, AdamW, clip_grad_norm
from tests.oracles import make


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", 100)


@pytest.fixture(params=[flat.WHOLE, 100], ids=["small", "large"])
def either(request, monkeypatch):
    """Parameters of 100 values are small ones, or large."""
    monkeypatch.setattr(flat, "WHOLE", request.param)


def test_small_parameters_share_a_buffer_and_large_ones_stay_where_they_are(large):
    params = [nn.Parameter(torch.randn(n)) for n in (10, 100, 20, 300)]
    places, before = [p.data_ptr() for p in params], [p.detach().clone() for p in params]
    AdamW(params)
    assert [p.data_ptr() == place for p, place in zip(params, places, strict=True)] == [False, True, False, True]
    assert params[0].untyped_storage().data_ptr() == params[2].untyped_storage().data_ptr()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_small_ones_are_aligned_and_autograd_adds_into_the_buffer():
    params = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (1,), (33,), (4, 3, 2), (0,), (252,))]
    optimizer = AdamW(params)
    full, grads = [p for p in params if p.numel()], [p.grad for p in params]
    assert all(p.data_ptr() % 64 == full[0].data_ptr() % 64 for p in full)
    for _ in range(2):
        sum(p.sum() for p in params).backward()
    assert all(p.grad is g and g.eq(2).all() for p, g in zip(params, grads, strict=True))
    assert len({p.grad.untyped_storage().data_ptr() for p in full}) == 1
    optimizer.zero_grad()
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))


def test_a_large_gradient_is_gone_between_the_step_and_the_next_backward(large):
    small, big = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(100))
    optimizer = AdamW([small, big])
    for _ in range(2):
        optimizer.zero_grad()
        assert big.grad is None and not small.grad.any()
        (small.sum() + big.sum()).backward()
        optimizer.step()
        assert big.grad.eq(1).all()
    optimizer.zero_grad(set_to_none=False)      # then it takes part with a zero one
    assert not big.grad.any()
    before = big.detach().clone()
    optimizer.step()
    assert not torch.equal(big, before)


def test_what_the_backward_will_make_is_counted_as_to_come(tiny, monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", 10_000)
    model = mt.load(tiny, device="cpu", train="full")
    assert model.network.trained_values().to_come == model.network.trained_values().values
    optimizer = mt.AdamW(model.trainable_parameters())
    large = sum(p.numel() for p in model.trainable_parameters() if p.numel() >= flat.WHOLE)
    assert 0 < large == model.network.trained_values().to_come < model.network.trained_values().values
    optimizer.keep_gradients()
    assert model.network.trained_values().to_come == 0


@pytest.mark.parametrize("memory", ["keep", "full"])
def test_the_backwards_gradient_becomes_the_parameters_own_without_a_copy(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", 1)
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, device="cpu", dtype="float32", train=["*_proj.weight", "lm_head.weight"], memory=memory)
    optimizer, made = mt.AdamW(model.trainable_parameters()), set()

    def seen(function):
        def noting(*args, **kwargs):
            result = function(*args, **kwargs)
            made.add((result[1] if isinstance(result, tuple) else result).data_ptr())
            return result
        return noting

    optimizer.zero_grad()
    with mock.patch.object(lora_matmul, "backward_weight", seen(lora_matmul.backward_weight)), \
            mock.patch.object(linear_cross_entropy, "gradients", seen(linear_cross_entropy.gradients)):
        model.loss(mt.data.pack([list(range(3, 40))], tokens=64)[0]).backward()
    assert {p.grad.data_ptr() for p in model.trainable_parameters()} == made


def test_kept_gradients_stay_where_they_are_and_one_without_a_backward_is_skipped(large):
    used, unused = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(100))
    optimizer = SGD([used, unused], lr=1.0, weight_decay=0.5)
    optimizer.keep_gradients()
    places = [used.grad.data_ptr(), unused.grad.data_ptr()]
    for step in range(3):
        optimizer.zero_grad()
        if step == 1:
            used.grad = torch.full((100,), 2.0)      # somebody else's
        else:
            (2 * used).sum().backward()
        assert optimizer.clip(None).item() == pytest.approx(20.0)
        optimizer.step()
        assert [used.grad.data_ptr(), unused.grad.data_ptr()] == places
    assert unused.eq(1).all() and used.isclose(torch.tensor(-3.375)).all()


def test_a_gradient_from_before_is_kept(large):
    p = nn.Parameter(torch.zeros(100))
    p.sum().backward()
    optimizer = SGD([p], lr=1.0)
    optimizer.keep_gradients()
    optimizer.step()
    assert p.eq(-1).all()


def test_parameters_and_gradients_that_lie_crosswise(large):
    p = nn.Parameter(torch.arange(120.0).view(10, 12).mT)
    before = p.detach().clone()
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones(10, 12).mT
    optimizer.step()
    assert torch.equal(p, before - 1)


def test_a_large_parameter_that_was_moved_or_cast_is_named(large):
    p = nn.Parameter(torch.zeros(100))
    optimizer = SGD([("up_proj", p)], lr=1.0)
    p.grad = torch.ones(100)
    p.data = torch.zeros(50)
    with pytest.raises(mt.InputError, match=r"up_proj was \[100\].* and is \[50\]"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("keep", [False, True])
def test_one_that_is_frozen_later_moves_on_no_old_gradient(either, keep, set_to_none):
    p = nn.Parameter(torch.zeros(100))
    optimizer = SGD([p], lr=1.0)
    optimizer.keep_gradients(keep)
    p.sum().backward()
    optimizer.step()
    p.requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        assert optimizer.clip(1.0).item() == 0.0
        optimizer.step()
    assert p.eq(-1).all()
    p.requires_grad_(True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        p.sum().backward()
        optimizer.step()
    assert p.eq(-3).all()


def test_zeroed_in_place_where_zeros_count(either):
    p = nn.Parameter(torch.zeros(100))
    optimizer = SGD([p], lr=1.0)
    optimizer.zero_grad()
    p.sum().backward()
    seen = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is seen and not seen.any()
    p.square().sum().backward(create_graph=True)
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any() and not p.grad.requires_grad


def test_gradients_with_a_graph_or_of_inference_mode_are_taken(either):
    p = nn.Parameter(torch.ones(100))
    optimizer = SGD([p], lr=1.0)
    optimizer.zero_grad()
    p.square().sum().backward(create_graph=True)
    optimizer.step()
    assert p.eq(-1).all() and not p.grad.requires_grad
    with torch.inference_mode():
        gradient = torch.full((100,), 2.0)
    p.grad = gradient
    optimizer.clip(10.0)        # the norm is 20
    optimizer.step()
    assert p.isclose(torch.tensor(-2.0)).all() and gradient.eq(2).all()


def test_released_gradients_are_none_unless_they_are_kept(large):
    small, big = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(100))
    optimizer = SGD([small, big], lr=1.0)
    (small.sum() + big.sum()).backward()
    optimizer.release_gradients()
    assert big.grad is None and small.grad.eq(1).all()
    optimizer.step()
    assert small.eq(-1).all() and not big.any()
    optimizer.keep_gradients()
    optimizer.add_param_group({"params": [late := nn.Parameter(torch.zeros(200))]})
    places = [big.grad.data_ptr(), late.grad.data_ptr()]
    (big.sum() + late.sum()).backward()
    optimizer.keep_gradients()      # as it is already
    optimizer.release_gradients()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert [big.grad.data_ptr(), late.grad.data_ptr()] == places and big.eq(-1).all() and late.eq(-1).all()
    optimizer.keep_gradients(False)
    optimizer.zero_grad()
    assert big.grad is None


@pytest.mark.parametrize("n", [100, 256, 1000, 4097])
def test_large_ones_keep_their_moments_in_8_bits_as_small_ones_do(n, monkeypatch):
    found = []
    for size in (flat.WHOLE, 1):
        monkeypatch.setattr(flat, "WHOLE", size)
        generator = torch.Generator().manual_seed(n)
        p = nn.Parameter(torch.randn(n, generator=generator))
        optimizer = AdamW([p], lr=1e-2, moments="8bit")
        for _ in range(3):
            optimizer.zero_grad()
            (p * torch.randn(n, generator=generator)).sum().backward()
            optimizer.step()
        state = optimizer.state[p]
        assert state["exp_avg_codes"].dtype == torch.uint8 and state["exp_avg_codes"].shape == p.shape
        found.append([p.detach(), *(state[name] for name in sorted(state))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_sparse_gradient_is_named(either):
    table = nn.Parameter(torch.zeros(100, 2))
    optimizer = SGD([("embed_tokens", table)], lr=1.0)
    table.grad = None
    nn.functional.embedding(torch.tensor([3, 5]), table, sparse=True).sum().backward()
    with pytest.raises(mt.InputError, match=r"embed_tokens has a sparse gradient; use a dense one"):
        optimizer.step()


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1"])
def test_a_norm_to_clip_to_that_is_none_is_named(max_norm):
    optimizer = SGD([nn.Parameter(torch.ones(3))], lr=1.0)
    for clip in (optimizer.clip, lambda norm: clip_grad_norm([nn.Parameter(torch.ones(3))], norm)):
        with pytest.raises(mt.InputError, match=r"max_norm is .*; it must be a number of at least 0"):
            clip(max_norm)
