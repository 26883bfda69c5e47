"""GraphedStep: a padded batch has the losses and gradients of the batch, and what cannot be recorded is said."""

import pytest
import torch

import minitune as mt
from minitune.objectives.sft import sft
from minitune.training import graph
from minitune.training.optimizers import AdamW
from tests.oracles import make


def _batch(tokens=40):
    return mt.data.pack([list(range(3, 20)), list(range(5, 14)), [7, 8]], tokens)[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_padding_changes_no_loss_and_no_gradient(tmp_path, weighted):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4), device="cpu", dtype="float32")
    batch = _batch()
    if weighted:
        batch = mt.data.Batch(tokens=batch.tokens, labels=batch.labels, cu_seqlens=batch.cu_seqlens,
                              weights=torch.rand(batch.n_tokens))
    padded = graph.padded(batch, 9, 33)
    assert len(padded.cu_seqlens) == 10 and len(padded.trained) == 33 and padded.n_trained == batch.n_trained
    assert not padded.documents.exact and not padded.to("cpu").documents.exact      # nobody chooses a way by them
    results = []
    for each in (batch, padded):
        loss, n = sft(model, each)
        results.append([loss, *torch.autograd.grad(loss, model.trainable_parameters())])
        assert n == batch.n_trained
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_batch_with_more_than_there_is_room_for_is_refused():
    with pytest.raises(mt.InputError, match="the batch has 4 documents, the graph has room for 3"):
        graph.padded(_batch(), 3, 33)
    with pytest.raises(mt.InputError, match="the batch has 25 trained positions, the graph has room for 24"):
        graph.padded(_batch(), 9, 24)


CASES = {
    "a CPU": ("llama-2-gqa", {}, {}, "cuda", "the model is on cpu"),
    "dropout": ("llama-2-gqa", {}, {"dropout": 0.1}, "cpu", "plain autograd"),
    "auto": ("llama-2-gqa", {"memory": "auto"}, {}, "cpu", "memory is 'auto'"),
    "offload": ("llama-2-gqa", {"memory": "offload"}, {}, "cpu", "memory is 'offload'"),
    "dynamic RoPE": ("llama-dynamic", {}, {}, "cpu", "dynamic RoPE"),
    "lengths": ("llama-2-gqa", {"dtype": "float32"}, {}, "cpu", "lengths that the host has to know"),
}


@pytest.mark.parametrize(("variant", "options", "lora", "device", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_recorded_is_said(variant, options, lora, device, message, tmp_path, monkeypatch):
    make(variant, tmp_path)
    monkeypatch.setattr(graph, "DEVICE", device)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4, **lora), device="cpu", **{"memory": "keep", **options})
    model.train(True)
    with pytest.raises(mt.InputError, match=f"GraphedStep: .*{message}"):
        graph.GraphedStep(model, AdamW(model.trainable_parameters()), _batch(), sft, n_documents=8, n_trained=32)


def test_an_optimizer_whose_gradients_move_is_refused(tmp_path, monkeypatch):
    make("llama-2-gqa", tmp_path)
    monkeypatch.setattr(graph, "DEVICE", "cpu")
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4), device="cpu", memory="keep")
    with pytest.raises(mt.InputError, match="the optimizer is SGD, whose gradients move"):
        graph.GraphedStep(model, torch.optim.SGD(model.trainable_parameters(), lr=1.0), _batch(), sft, n_documents=8,
                          n_trained=32)
