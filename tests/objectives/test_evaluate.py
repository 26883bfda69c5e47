"""evaluate: loss, perplexity and accuracy beside plain PyTorch's, over trained tokens alone, and nothing is changed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import minitune as mt
from minitune.objectives.evaluate import Evaluation, evaluate
from minitune.ops import linear_cross_entropy


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 4096, (n,), generator=generator).tolist() for n in (17, 30, 9, 41)]
    found = mt.data.pack([(d, [-100] * (len(d) // 3) + d[len(d) // 3 + 1:] + [-100]) for d in ids], 48)
    weights = torch.rand(48, generator=generator) + 0.5
    return [mt.Batch(tokens=b.tokens, labels=b.labels, cu_seqlens=b.cu_seqlens, weights=weights) for b in found]


@pytest.mark.parametrize("chunk", [1 << 26, 4 * 4096 * 16])
def test_figures_are_those_of_plain_pytorch(tiny, monkeypatch, chunk):
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", chunk)
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    losses, right = [], []
    with torch.no_grad():
        for batch in batches():
            logits = model.logits(batch.tokens, batch.cu_seqlens)[batch.trained]
            labels = batch.labels[batch.trained]
            losses.append(F.cross_entropy(logits.double(), labels, reduction="none"))
            right.append(logits.argmax(-1) == labels)
    expected, n = torch.cat(losses).mean().item(), sum(map(len, losses))
    model.train()
    found = evaluate(model, batches())
    assert found.loss == pytest.approx(expected, rel=1e-6) and found.n_tokens == n == 62
    assert found.accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert model.training


def test_accuracy_counts_the_tokens_that_the_model_would_write(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    start = [5, 6, 7]
    written = model.generate(start, 12)
    sure = mt.data.pack([(start + written, [-100] * 2 + written + [-100])], len(start + written))
    assert evaluate(model, sure).accuracy == 1.0
    wrong = [(each + 1) % 4096 for each in written]
    off = mt.data.pack([(start + wrong, [-100] * 2 + wrong[:1] + [-100] * len(wrong))], len(start + wrong))
    assert evaluate(model, off) == evaluate(model, off) and evaluate(model, off).accuracy == 0.0


def test_an_adapter_is_seen_and_dropout_is_not(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2, dropout=0.5))
    model.train()
    base = evaluate(model, batches())
    for adapter in model.network.adapters().values():
        torch.nn.init.normal_(adapter.B, generator=torch.Generator().manual_seed(3))
    adapted = evaluate(model, batches())
    assert adapted == evaluate(model, batches()) != base and model.training
    with model.adapter_disabled():
        assert evaluate(model, batches()) == base


def test_data_without_a_trained_token_is_refused_and_the_mode_put_back(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    model.train()
    empty = mt.data.pack([([5, 6, 7], [-100] * 3)], 8)
    for data in (empty, []):
        with pytest.raises(mt.InputError, match="evaluate: the data has no trained token"):
            evaluate(model, data)
    assert model.training
    model.eval()
    evaluate(model, batches())
    assert not model.training


def test_a_hopeless_loss_has_a_perplexity_too():
    assert Evaluation(loss=800.0, accuracy=0.0, n_tokens=1).perplexity == math.inf


def test_of_a_stream_one_epoch_is_taken(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    rows = [{"text": "one two three"}, {"text": "four five"}]
    once, thrice = (mt.data.stream(rows, model.tokenizer, tokens=32, epochs=epochs) for epochs in (1, 3))
    assert len(thrice) == 3 * len(once) and evaluate(model, thrice) == evaluate(model, once)
