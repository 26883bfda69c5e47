"""GraphedStep but for the recording: what a replay reads and leaves behind, over a pass that is run again instead."""

import pytest
import torch

from minitune.data.packing import pack
from minitune.errors import InputError
from minitune.objectives.sft import sft
from minitune.training import flat, graph
from minitune.training.optimizers import AdamW
from minitune.training.step import train_step
from tests.kernels.tiny import Tiny, as_on_a_gpu

ROOM = {"n_documents": 4, "n_trained": 26}
ROWS = [([9, 12], [30]), ([20, 7, 3],)]
"""Lengths of the documents of each step's micro-batches, of 32 tokens each."""


def _micro_batches(lengths, seed):
    """The first quarter of each document is not trained."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * (len(ids) // 4) + ids[len(ids) // 4 + 1:] + [-100] for ids in documents]
    return pack(list(zip(documents, labels, strict=True)), 32)[0]


def _rows():
    return [[_micro_batches(lengths, 10 * i + j) for j, lengths in enumerate(step)] for i, step in enumerate(ROWS)]


@pytest.fixture
def again(monkeypatch, device):
    """A "graph" that runs the pass again over the same memory; on a GPU the recording itself."""
    def record(run, device):
        result = run().clone()
        return lambda: result.copy_(run()), result

    if device == "cpu":
        monkeypatch.setattr(graph, "DEVICE", "cpu")
        monkeypatch.setattr(graph, "record", record)


@pytest.mark.parametrize(("train", "large"), [(None, flat.WHOLE), ("full", flat.WHOLE), ("full", 1)],
                         ids=["adapters", "base weights", "large base weights"])
@pytest.mark.usefixtures("again")
def test_every_step_is_that_of_the_padded_batches(train, large, device, monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", large)
    monkeypatch.setattr(flat, "WHOLE_ON_A_GPU", large)
    results = []
    for graphed in (False, True):
        model = Tiny(1, torch.float32, device, train)
        optimizer = AdamW(model.parameters, lr=1e-3)
        with as_on_a_gpu(monkeypatch):
            if graphed:
                example = _micro_batches([32], 0)
                step = graph.GraphedStep(model, optimizer, example, sft, **ROOM)
                assert all(not p.grad.any() for p in model.parameters)
            for i, batches in enumerate(_rows()):
                lr = 1e-2 / (i + 1)
                if graphed:
                    found = step(batches, lr, 0.5)
                else:
                    padded = [graph.padded(batch, **ROOM).to(device) for batch in batches]
                    found = train_step(model, padded, optimizer, lr, 0.5, sft)
                results.append([found.loss.clone(), found.grad_norm.clone(), found.n_trained, found.n_tokens,
                                *(p.detach().clone() for p in model.parameters)])
    half = len(results) // 2
    for expected, found in zip(results[:half], results[half:], strict=True):
        assert found[2:4] == expected[2:4]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, torch.Tensor))
    assert not torch.equal(results[0][5], results[-1][5]), "B did not move"


@pytest.mark.usefixtures("again")
def test_padding_changes_no_loss(device, monkeypatch):
    model = Tiny(1, torch.float32, device, windows=(5,))
    batch = _micro_batches([9, 12], 3)
    losses = []
    with as_on_a_gpu(monkeypatch):
        for each in (batch, graph.padded(batch, 7, 30)):
            loss, n = sft(model, each.to(device))
            losses.append([loss, *torch.autograd.grad(loss, model.parameters)])
            assert n == batch.n_trained
    for expected, found in zip(*losses, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("again")
def test_what_does_not_fit_the_graph_is_named(device, monkeypatch):
    model = Tiny(1, torch.float32, device)
    with as_on_a_gpu(monkeypatch):
        step = graph.GraphedStep(model, AdamW(model.parameters), _micro_batches([32], 0), sft, **ROOM)
        with pytest.raises(InputError, match="8 documents, the graph has room for 4"):
            step([_micro_batches([4] * 8, 1)], 1e-3, 0.0)
        with pytest.raises(InputError, match="a batch has 16 tokens; the graph is of 32"):
            step([pack([list(range(3, 15))], 16)[0]], 1e-3, 0.0)
        with pytest.raises(InputError, match="holds token 99"):
            step([pack([[99] * 9], 32)[0]], 1e-3, 0.0)
        with pytest.raises(InputError, match="no token of this step is trained"):
            step([pack([([5, 6], [-100, -100])], 32)[0]], 1e-3, 0.0)
        model.parameters[0].data = model.parameters[0].data.clone()
        with pytest.raises(InputError, match="a parameter or a gradient lies elsewhere"):
            step([_micro_batches([32], 1)], 1e-3, 0.0)
