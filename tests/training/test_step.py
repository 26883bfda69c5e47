"""train_step: any split into micro-batches gives one gradient, and the pieces are put together right."""

from __future__ import annotations

import copy

import pytest
import torch

from minitune.errors import InputError
from minitune.training import flat
from minitune.training.optimizers import SGD, AdamW
from minitune.training.step import train_step

LENGTHS = [3, 17, 5, 41, 2, 9, 28, 12]
SPLITS = {"1x8": [LENGTHS], "2x4": [LENGTHS[:4], LENGTHS[4:]], "8x1": [[n] for n in LENGTHS],
          "uneven": [LENGTHS[:1], LENGTHS[1:7], LENGTHS[7:]]}


def joined(fakes, lengths):
    """Documents whose content depends on their length alone, so that splits hold the same documents."""
    parts = [fakes.make_batch(n, seed=n) for n in lengths]
    return fakes.Batch(tokens=torch.cat([b.tokens for b in parts]), labels=torch.cat([b.labels for b in parts]),
                       cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


def step(fakes, split, optimizer_of=lambda p: SGD(p, lr=1.0), clip=0.0, lr=0.0):
    model = fakes.TinyModel()
    torch.nn.init.normal_(model.B, generator=torch.Generator().manual_seed(5))
    optimizer = optimizer_of(model.param_groups(1.0))
    result = train_step(model, [joined(fakes, lengths) for lengths in split], optimizer, lr, clip, fakes.objective)
    return model, result, optimizer


@pytest.mark.parametrize("name", ["2x4", "8x1", "uneven"])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_splits_of_unequal_lengths_agree(fakes, name, clip):
    whole, expected, _ = step(fakes, SPLITS["1x8"], clip=clip)
    split, result, _ = step(fakes, SPLITS[name], clip=clip)
    for a, b in ((split.A.grad, whole.A.grad), (split.B.grad, whole.B.grad), (result.loss, expected.loss),
                 (result.grad_norm, expected.grad_norm)):
        assert ((a - b).norm() / b.norm()).item() < 1e-6
    assert (result.n_trained, result.n_tokens) == (expected.n_trained, expected.n_tokens) == (73, sum(LENGTHS))


def test_gradient_loss_and_norm_are_those_of_the_mean(fakes):
    model, result, _ = step(fakes, SPLITS["2x4"])
    loss_sum, n = model.loss_sum(joined(fakes, LENGTHS))
    grads = torch.autograd.grad(loss_sum / n, [model.A, model.B])
    torch.testing.assert_close(model.A.grad, grads[0])
    torch.testing.assert_close(model.B.grad, grads[1])
    assert result.loss.item() == pytest.approx((loss_sum / n).item(), rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-6)


def test_clip_and_torchs_optimizer_agree_with_ours(fakes):
    ours, mine, _ = step(fakes, SPLITS["2x4"], lambda p: AdamW(p, lr=9.0), clip=0.05, lr=0.01)
    theirs, torchs, _ = step(fakes, SPLITS["2x4"], lambda p: torch.optim.AdamW(p, lr=9.0, weight_decay=0.0), clip=0.05,
                             lr=0.01)
    assert mine.grad_norm.item() == pytest.approx(torchs.grad_norm.item()) and mine.grad_norm > 0.05
    torch.testing.assert_close(ours.A.grad, theirs.A.grad)
    torch.testing.assert_close(ours.A, theirs.A)
    torch.testing.assert_close(ours.B, theirs.B)


def test_group_ratio_scales_the_learning_rate(fakes):
    model = fakes.TinyModel()
    groups = [{"params": [model.A]}, {"params": [model.B], "lr_ratio": 16.0}]
    optimizer = SGD(groups, lr=1.0)
    before = model.B.detach().clone()
    train_step(model, [fakes.make_batch(9)], optimizer, 0.01, 0.0, fakes.objective)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.16]
    torch.testing.assert_close(model.B.detach(), before - 0.16 * model.B.grad)


def test_a_micro_batch_without_trained_tokens_changes_nothing(fakes):
    model, other = fakes.TinyModel(), fakes.TinyModel()
    filler = fakes.make_batch(30, trained=False)
    a = train_step(model, [fakes.make_batch(9), filler], SGD(model.param_groups(1.0), 1.0), 1.0, 1.0, fakes.objective)
    b = train_step(other, [fakes.make_batch(9)], SGD(other.param_groups(1.0), 1.0), 1.0, 1.0, fakes.objective)
    assert torch.equal(model.B, other.B) and torch.equal(a.loss, b.loss)
    assert (a.n_tokens, b.n_tokens) == (39, 9)
    with pytest.raises(InputError, match="none of the 30 tokens"):
        train_step(model, [filler], SGD(model.param_groups(1.0), 1.0), 1.0, 1.0, fakes.objective)


def test_an_objective_that_miscounts_is_refused(fakes):
    model = fakes.TinyModel()
    with pytest.raises(InputError, match="counted 1 losses where the batch has 5"):
        train_step(model, [fakes.make_batch(9)], SGD(model.param_groups(1.0), 1.0), 1.0, 1.0,
                   lambda m, b: (m.loss_sum(b)[0], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_an_objective_may_count_in_another_dtype(fakes, make, dtype, clip):
    weights, losses = [], []
    for kind in (torch.float32, dtype):
        model = fakes.TinyModel()
        result = train_step(model, [fakes.make_batch(9)], make(model.param_groups(0.1), 0.1), clip=clip,
                            objective=lambda m, b, kind=kind: (m.loss_sum(b)[0].to(kind), b.n_trained))
        weights.append(model.B.detach().clone())
        losses.append(result.loss)
    torch.testing.assert_close(weights[1], weights[0], rtol=4e-3, atol=1e-6)        # 1 / n in bf16
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)     # of the same dtype: fp32


def test_the_models_own_loss_and_the_groups_own_rates_are_the_default(fakes):
    model, other = fakes.TinyModel(), fakes.TinyModel()
    batches = [joined(fakes, LENGTHS[:3]), joined(fakes, LENGTHS[3:])]
    optimizers = [torch.optim.SGD([{"params": [m.A], "lr": 0.3}, {"params": [m.B], "lr": 0.1}]) for m in (model, other)]
    train_step(model, batches, optimizers[0], objective=None)
    for batch in batches:
        (other.loss_sum(batch)[0] / sum(b.n_trained for b in batches)).backward()
    torch.nn.utils.clip_grad_norm_([other.A, other.B], 1.0)
    optimizers[1].step()
    torch.testing.assert_close(model.A, other.A)
    torch.testing.assert_close(model.B, other.B)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.3, 0.1]


def _wrong_objective(found):
    return lambda model, batch: found


@pytest.mark.parametrize(("change", "message"), [
    ({"lr": -1.0}, "lr is -1.0; it must be a finite number"), ({"lr": float("nan")}, "lr is nan"),
    ({"lr": "1e-4"}, "lr is '1e-4'"), ({"clip": -1.0}, "max_norm is -1.0"), ({"micro_batches": "abc"}, "is 'abc'"),
    ({"lr": True}, "lr is True; it must be a finite number"), ({"clip": True}, "max_norm is True; it must be a number"),
    ({"micro_batches": []}, "train_step: micro_batches has no batch; give at least one"),
    ({"micro_batches": iter(())}, "micro_batches has no batch"),
    ({"micro_batches": None}, "micro_batches is None"), ({"micro_batches": [[1, 2]]}, r"holds \[1, 2\]; give mt.Batch"),
    ({"objective": _wrong_objective(torch.ones(()))}, r"the objective gave tensor\(1.*; it must give"),
    ({"objective": _wrong_objective((torch.ones(()), 5))}, "it must give"),
    ({"objective": 3}, "train_step: objective is 3; give a function"),
    ({"objective": lambda: None}, r"objective cannot be called with a model and a batch \(too many"),
    ({"optimizer": None}, "train_step: optimizer is None; give mt.AdamW"),
    ({"objective": _wrong_objective((torch.ones((), requires_grad=True), torch.tensor(5)))}, "it must give"),
])
def test_what_makes_no_step_is_refused_and_changes_no_weight(fakes, change, message):
    model = fakes.TinyModel()
    before = [p.detach().clone() for p in (model.A, model.B)]
    given = {"micro_batches": [fakes.make_batch(9)], "optimizer": SGD(model.param_groups(1.0), 1.0), "lr": 0.1,
             "clip": 1.0, "objective": fakes.objective} | change
    with pytest.raises(InputError, match=message):
        train_step(model, **given)
    assert all(torch.equal(a, b) for a, b in zip(before, (model.A, model.B), strict=True))


def test_batches_may_come_from_an_iterator_and_need_gradients(fakes):
    model, other = fakes.TinyModel(), fakes.TinyModel()
    for each, batches in ((model, iter([fakes.make_batch(9)])), (other, fakes.make_batch(9))):
        train_step(each, batches, SGD(each.param_groups(1.0), 1.0), 0.1, 0.0, fakes.objective)
    assert torch.equal(model.B, other.B)
    with torch.no_grad(), pytest.raises(InputError, match="train_step: gradients are switched off here"):
        train_step(model, [fakes.make_batch(9)], SGD(model.param_groups(1.0), 1.0))


def test_a_large_gradient_does_not_outlive_its_step(fakes, monkeypatch):
    """What comes before the next backward has its memory."""
    monkeypatch.setattr(flat, "WHOLE", 30)
    model, _, _ = step(fakes, SPLITS["2x4"], lr=0.1)
    assert model.A.numel() < 30 <= model.B.numel() and model.A.grad is not None and model.B.grad is None


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1), lambda p: AdamW(p, lr=0.1, moments="8bit"),
                                  lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)],
                         ids=["adamw", "adamw 8bit", "sgd", "torch"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(fakes, make, clip, spoilt):
    model = fakes.TinyModel()
    parameters = [model.A, model.B]
    optimizer = make(parameters)
    batch = joined(fakes, LENGTHS)
    train_step(model, [batch], optimizer, clip=clip)

    def objective(model, batch):
        loss, n = model.loss_sum(batch)
        return loss * spoilt, n

    before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    result = train_step(model, [batch], optimizer, clip=clip, objective=objective)
    assert not result.loss.isfinite() and not result.grad_norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before[0], parameters, strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[1]["state"][i][name], value) for i in after for name, value in after[i].items())
    result = train_step(model, [batch], optimizer, clip=clip)
    assert result.loss.isfinite() and not torch.equal(before[0][0], model.A)
