"""DPO: the loss of pairs and its gradient against the paper's formula over plain logits, its step, its evaluation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import minitune as mt
from minitune.errors import InputError
from minitune.objectives.dpo import DPO
from tests.batches import documents

LENGTHS = (20, 31, 9, 14, 40, 7)


@pytest.fixture(params=[{}, {"quant": "nf4"}, {"lora": mt.LoRA(rank=4, dora=True)}], ids=["lora", "nf4", "dora"])
def model(tiny, request):
    """One whose adapter has moved."""
    found = mt.load(tiny, **({"lora": mt.LoRA(rank=4), "dtype": "float32"} | request.param))
    moved(found)
    found.train()
    return found


def moved(model, size=0.05):
    generator = torch.Generator().manual_seed(3)
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, size, generator=generator)


def pairs(lengths=LENGTHS, tokens=160, weights=None, seed=5):
    """A batch of documents whose second halves are trained, with filler behind."""
    ids = [d.tolist() for d in documents(lengths, seed)]
    (batch,) = mt.data.pack([mt.data.Document(d, [i >= len(d) // 2 for i in range(len(d))]) for d in ids], tokens)
    order = batch.documents.lengths[:len(lengths)]
    assert sorted(order) == sorted(lengths)
    each = None if weights is None else torch.tensor([w for w in weights for _ in range(2)] + [1.0]).repeat_interleave(
        torch.tensor(batch.documents.lengths))
    return mt.Batch(tokens=batch.tokens, labels=batch.labels, cu_seqlens=batch.cu_seqlens, weights=each,
                    n_filler=batch.n_filler)


def by_hand(model, batch, beta, weights=(1, 1, 1)):
    """The mean over the pairs, from the logits of each document by itself."""
    def logp(start, end):
        ids, labels = batch.tokens[start:end], batch.labels[start:end]
        at = (labels != -100).nonzero().flatten()
        return model.logits(ids).log_softmax(-1)[at, labels[at]].sum()

    bounds = batch.cu_seqlens.tolist()
    spans = list(pairwise(bounds))[:6]
    with torch.no_grad(), model.adapter_disabled():
        base = [logp(*span) for span in spans]
    gained = [logp(*span) - before for span, before in zip(spans, base, strict=True)]
    losses = [-F.logsigmoid(beta * (chosen - rejected)) for chosen, rejected in zip(gained[::2], gained[1::2],
                                                                                  strict=True)]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / 3


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_and_gradient_are_the_papers(model, beta, weights):
    batch = pairs(weights=weights)
    total, n = DPO(beta)(model, batch)
    assert n == 3
    (total / n).backward()
    found = [p.grad.clone() for p in model.trainable_parameters()]
    model.zero_grad()
    wanted = by_hand(model, batch, beta, weights or (1, 1, 1))
    wanted.backward()
    torch.testing.assert_close(total / n, wanted, rtol=0, atol=5e-5)      # of sums of a hundred nats
    for grad, parameter in zip(found, model.trainable_parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()))


def test_a_new_adapter_has_gained_nothing(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4))
    total, n = DPO()(model, pairs())
    assert total.item() / n == pytest.approx(math.log(2), abs=1e-6)
    total.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.trainable_parameters())
    seen = DPO().evaluate(model, [pairs()])
    assert (seen.loss, seen.accuracy) == (pytest.approx(math.log(2), abs=1e-6), 0.5)


def test_any_split_gives_the_same_step(tiny):
    """A pair counts as much whatever its length: the step divides by pairs, not by trained tokens."""
    def step(batches):
        model = mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")
        moved(model)
        result = mt.train_step(model, batches, mt.SGD(model.param_groups(1.0), 1.0), 1.0, 0.0, DPO(0.5))
        return result, [p.detach().clone() for p in model.trainable_parameters()]

    whole = pairs(tokens=sum(LENGTHS))
    lengths = whole.documents.lengths
    parts, start = [], 0
    for first, second in zip(lengths[::2], lengths[1::2], strict=True):
        end = start + first + second
        parts.append(mt.Batch(tokens=whole.tokens[start:end], labels=whole.labels[start:end],
                              cu_seqlens=torch.tensor([0, first, first + second], dtype=torch.int32)))
        start = end
    (one, moved_one), (three, moved_three) = step([whole]), step(parts)
    assert one.n_trained == three.n_trained == whole.n_trained
    torch.testing.assert_close(one.loss, three.loss, rtol=1e-5, atol=1e-6)
    for left, right in zip(moved_one, moved_three, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_the_evaluation_counts_pairs(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")
    moved(model)
    model.train()
    batches = [pairs(), pairs(seed=8)]
    seen = DPO(0.3).evaluate(model, batches)
    margins = torch.cat([DPO(0.3).margins(model, batch).detach() for batch in batches])
    assert model.training and seen.n_tokens == sum(batch.n_trained for batch in batches)
    assert seen.loss == pytest.approx(float(-F.logsigmoid(0.3 * margins).mean()), rel=1e-5)
    assert seen.accuracy == float((margins > 0).double().mean()) and 0 < seen.accuracy < 1
    gains = [DPO(0.3).gains(model, batch) for batch in batches]
    for found, side in zip((seen.chosen, seen.rejected), zip(*gains, strict=True), strict=True):
        assert found == pytest.approx(float(torch.cat(side).mean()), rel=1e-5)


def test_the_evaluation_draws_no_dropout(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4, dropout=0.5), dtype="float32")
    moved(model)
    model.train()
    first, again = (DPO(0.3).evaluate(model, [pairs()]) for _ in range(2))
    model.eval()
    assert first == again == DPO(0.3).evaluate(model, [pairs()])


def test_the_evaluation_takes_one_epoch_and_refuses_what_evaluate_does(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4))
    rows = [{"prompt": f"a {i}", "chosen": "x", "rejected": "y"} for i in range(4)]
    found = [DPO().evaluate(model, mt.data.stream(rows, model.tokenizer, tokens=64, epochs=n, pairs=True)).n_tokens
             for n in (1, 3)]
    assert found[0] == found[1] > 0
    with pytest.raises(InputError, match="the data has no trained token"):
        DPO().evaluate(model, [])
    with pytest.raises(InputError, match=r"batches holds {'chosen'"):
        DPO().evaluate(model, rows)
    with pytest.raises(InputError, match=r"dpo: beta is -1; it must be"):
        DPO(-1)


def test_what_is_no_batch_of_pairs(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4))
    with pytest.raises(InputError, match=r"dpo: a batch holds 5 documents that are no pairs"):
        DPO()(model, pairs(LENGTHS[:5]))
    with pytest.raises(InputError, match="a batch holds 2 documents that are no pairs"):
        mt.train(model, mt.data.pack([[5, 6, 7], [5, 6]], 8), objective=DPO(), quiet=True)
    with pytest.raises(InputError, match="that are no pairs"):
        mt.train_step(model, pairs(LENGTHS[:5]), mt.SGD(model.param_groups(1.0), 1.0), 1.0, objective=DPO())
    with pytest.raises(InputError, match="counts its own losses"):
        mt.GraphedStep(model, mt.SGD(model.param_groups(1.0), 1.0), pairs(), n_documents=8, n_trained=200,
                       objective=DPO())


class Halves:
    """An objective that counts its own losses: two a batch."""

    def n_losses(self, batch):
        return 2

    def __call__(self, model, batch):
        return model.loss(batch) * 2, self.told

    told = 2


def test_an_objective_may_count_its_own_losses(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")
    batches = [pairs(), pairs(seed=8)]
    means = [model.loss(batch).item() for batch in batches]
    optimizer = mt.SGD(model.param_groups(1.0), 1.0)
    result = mt.train_step(model, batches, optimizer, 1e-3, objective=Halves())
    assert float(result.loss) == pytest.approx(sum(means) / 2, rel=1e-5)
    assert result.n_trained == sum(batch.n_trained for batch in batches)
    wrong = Halves()
    wrong.told = 3
    with pytest.raises(InputError, match="the objective counted 3 losses where the batch has 2"):
        mt.train_step(model, batches, optimizer, 1e-3, objective=wrong)
