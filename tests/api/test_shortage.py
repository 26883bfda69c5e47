"""Memory that runs out anywhere in a step of a real model: the run is bit for bit the one that had a cheaper memory
policy from the start, and where there is none it goes on with fewer documents at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minitune as mt
from minitune.training import runner
from minitune.training.run import Observer
from tests.files import write_numbers

KINDS = {"lora": {"lora": mt.LoRA(rank=2)}, "nf4": {"lora": mt.LoRA(rank=2), "quant": "nf4"},
         "dropout": {"lora": mt.LoRA(rank=2, dropout=0.2)}, "full": {"train": "full"}}


class OutOfMemory(TorchDispatchMode):
    """Fails at operation `at` of what runs within it; ``done`` counts them."""

    def __init__(self, at):
        super().__init__()
        self.at, self.done = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done += 1
        if self.done == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*args, **(kwargs or {}))


class Notes(Observer):
    def __init__(self):
        self.said = []

    def on_note(self, text):
        if "memory ran out" in text:
            self.said.append(text)


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(24))


def _train(tiny, data, monkeypatch, kind, at, memory="auto"):
    """-> (run, trained weights, notes, operations of its second step, which fails at one of them)."""
    model = mt.load(tiny, device="cpu", memory=memory, **KINDS[kind])
    real, calls, failing, notes = runner.gradients, [], OutOfMemory(at), Notes()

    def second_fails(*given):
        calls.append(given)
        if len(calls) != 2:
            return real(*given)
        with failing:
            return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "gradients", second_fails)
        run = mt.train(model, data, tokens=64, max_steps=3, micro_batches=2, quiet=True, observers=[notes])
    return run, [p.detach().clone() for p in model.trainable_parameters()], notes.said, failing.done


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_wherever_in_a_step_it_runs_out_the_results_stay(tiny, data, monkeypatch, kind):
    straight, wanted, _, operations = _train(tiny, data, monkeypatch, kind, 0)
    cheaper = "full" if kind == "dropout" else "pointwise"
    for at in range(1, operations + 1, operations // 9):
        run, found, notes, done = _train(tiny, data, monkeypatch, kind, at)
        assert done == at and len(notes) == 1 and f"the memory policy is {cheaper} from here on" in notes[0]
        assert run.losses == straight.losses, at
        assert all(map(torch.equal, found, wanted)), at


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_where_the_policy_was_chosen_by_hand_documents_come_one_after_the_other(tiny, data, monkeypatch, kind):
    straight, wanted, _, operations = _train(tiny, data, monkeypatch, kind, 0)
    run, found, notes, _ = _train(tiny, data, monkeypatch, kind, operations // 2, memory="keep")
    assert len(notes) == 1 and "32 tokens at a time" in notes[0]
    assert run.losses == pytest.approx(straight.losses, rel=1e-2)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=2e-3)


def test_an_objective_of_ones_own_sees_whole_rows(tiny, data):
    def together(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2), memory="full")
    with pytest.raises(torch.OutOfMemoryError) as failed:
        mt.train(model, data, tokens=64, max_steps=1, quiet=True, objective=together)
    assert "step 1: memory ran out with a row of 64 tokens and the memory policy full" in failed.value.__notes__[0]
