"""once: nobody gets second derivatives that are silently wrong; first ones stay as they are."""

from __future__ import annotations

import pytest
import torch

import minitune as mt
from minitune.errors import InputError
from minitune.ops import library
from minitune.ops.linear_cross_entropy import linear_cross_entropy
from tests.batches import documents, packed

REFUSED = "create_graph=True asks for second derivatives, which the hand-written backward does not have; leave it out"


def _loss(model):
    return model.loss(packed(documents((9, 5), 3), 16))


@pytest.mark.parametrize("how", [
    {"lora": mt.LoRA(rank=2)}, {"lora": mt.LoRA(rank=2), "memory": "full"}, {"lora": mt.LoRA(rank=2, dora=True)},
    {"lora": mt.LoRA(rank=2, dropout=0.1)}, {"lora": mt.LoRA(rank=2), "quant": "nf4"}, {"train": "full"},
    {"train": "head"}, {"train": "norms"}], ids=str)
@pytest.mark.filterwarnings("ignore:dropout and DoRA")
def test_a_loss_is_differentiated_once(tiny, how):
    model = mt.load(tiny, device="cpu", dtype="float32", **how)
    model.train()
    parameters = list(model.trainable_parameters())
    with pytest.raises(InputError, match=REFUSED):
        torch.autograd.grad(_loss(model), parameters, create_graph=True)
    with pytest.raises(InputError, match=REFUSED):
        _loss(model).backward(create_graph=True)
    loss = model.logits(torch.tensor([5, 6, 7])).square().mean()
    with pytest.raises(InputError, match=REFUSED):
        torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(_loss(model), parameters))


def test_where_autograd_does_all_the_second_derivative_is_right(tiny):
    """An adapter on the head alone; against the difference of two gradients."""
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2, targets="lm_head"))
    parameters = list(model.trainable_parameters())
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=generator) for p in parameters]

    def gradients(step):
        with torch.no_grad():
            torch._foreach_add_(parameters, along, alpha=step)
        return torch.autograd.grad(_loss(model), parameters)

    ahead, behind = gradients(1e-3), gradients(-2e-3)
    gradients(1e-3)
    expected = torch.cat([(a - b).flatten() / 2e-3 for a, b in zip(ahead, behind, strict=True)])
    first = torch.autograd.grad(_loss(model), parameters, create_graph=True)
    found = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), parameters)
    assert (torch.cat([g.flatten() for g in found]) - expected).norm() < 1e-2 * expected.norm()


def test_the_ops_of_compiled_programs_are_differentiated_once():
    x = torch.randn(4, 16, requires_grad=True)
    y = library.OPS.swiglu(x).sum()
    with pytest.raises(InputError, match=REFUSED):
        torch.autograd.grad(y, x, create_graph=True)
    assert torch.autograd.grad(y, x)[0].any()


def test_a_hessian_is_refused():
    hidden, head = torch.randn(3, 8), torch.randn(31, 8)

    def loss(hidden):
        return linear_cross_entropy(hidden, head, torch.tensor([1, 2, 3])).sum()

    with pytest.raises(InputError, match=REFUSED):
        torch.autograd.functional.hvp(loss, hidden, hidden)
