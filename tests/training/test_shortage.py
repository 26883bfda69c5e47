"""A step in which memory runs out is done again with less: first the memory policy, then fewer documents at a time."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from minitune.config import Training
from minitune.data.batch import Batch
from minitune.training.checkpoint import steps
from minitune.training.loop import fit
from minitune.training.run import Observer
from minitune.training.shortage import Shortage, free_what_hangs_on
from tests.training.stopping import checkpoints, dropped, train


class Heard(Observer):
    def __init__(self):
        self.notes, self.run = [], None

    def on_note(self, text):
        self.notes.append(text)

    def on_end(self, run):
        self.run = run


class Small:
    """An objective for which rows of more than `tokens` tokens are too long; ``seen``: lengths that it was given."""

    def __init__(self, objective, tokens, error=torch.OutOfMemoryError):
        self.objective, self.tokens, self.error, self.seen = objective, tokens, error, []

    def __call__(self, model, batch):
        self.seen.append(batch.n_tokens)
        found = self.objective(model, batch)        # so that it has drawn, and made a graph
        if batch.n_tokens > self.tokens:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2000000000 bytes")
        return found


def rows(fakes, n=4):
    """Rows of 24 tokens, each of four documents, with and without filler."""
    return [fakes.make_batch(6, 3, 7, 8, seed=seed) for seed in range(n)]


WHOLE, HALVES, ALONE = [24], [9, 7, 8], [6, 3, 7, 8]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize(("room", "seen", "told"), [
    (10, [*WHOLE, *HALVES * 4], [(24, 12)]), (8, [*WHOLE, 9, *ALONE * 4], [(24, 12), (9, 4)])])
def test_documents_of_a_row_are_computed_one_after_the_other_in_the_same_steps(fakes, error, room, seen, told):
    training, straight, other, heard = Training(lr=0.05, micro_batches=2), fakes.TinyModel(), fakes.TinyModel(), Heard()
    expected, small = fit(straight, rows(fakes), training, fakes.objective), Small(fakes.objective, room, error)
    run = fit(other, rows(fakes), training, small, [heard], divisible=True)
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    assert [(each.n_tokens, each.n_trained) for each in run.records] == [
        (each.n_tokens, each.n_trained) for each in expected.records]
    torch.testing.assert_close(other.B, straight.B, rtol=1e-4, atol=1e-6)
    assert small.seen == seen
    assert heard.notes[1:] == [
        f"step 1: memory ran out with rows of {before} tokens; from here on their documents are computed {after} "
        "tokens at a time, in the same steps, which changes no more than rounding" for before, after in told]


def test_what_dropout_draws_then_is_told(fakes):
    network = SimpleNamespace(save_memory=lambda tokens: None,
                              adapters=lambda: {"q_proj": SimpleNamespace(dropout=0.1)})
    assert Shortage(network, True).met(rows(fakes)).endswith("which changes rounding, and what dropout draws")
    network.adapters = lambda: {"q_proj": SimpleNamespace(dropout=0.0)}
    assert Shortage(network, True).met(rows(fakes)).endswith("which changes no more than rounding")


def test_an_error_that_came_from_another_holds_none_of_its_tensors_either():
    class Large:
        pass

    def first(held):
        large = Large()
        held.append(weakref.ref(large))
        raise MemoryError

    held = []
    try:
        try:
            first(held)
        except MemoryError as error:
            raise RuntimeError("out of memory") from error
    except RuntimeError as error:
        assert held[0]() is not None
        free_what_hangs_on(error, torch.device("cpu"))
        assert held[0]() is None


def test_what_the_caller_handles_keeps_its_frames():
    def fails(value):
        raise ValueError("the caller's")

    try:
        fails("kept")
    except ValueError as handled:
        try:
            fails("freed")
        except ValueError as error:
            assert error.__context__ is handled
            free_what_hangs_on(error, torch.device("cpu"), handled)
            frames = [traceback.tb_next.tb_frame.f_locals for traceback in (handled.__traceback__, error.__traceback__)]
            assert frames == [{"value": "kept"}, {}]


def test_filler_goes_first_and_the_order_of_documents_and_their_names_stay(fakes):
    batch = fakes.make_batch(4, 5, 6)
    filled = Batch(tokens=batch.tokens, labels=torch.cat([batch.labels[:9], torch.full((6,), -100)]), n_filler=6,
                   cu_seqlens=batch.cu_seqlens, pieces=(8, 3), weights=torch.arange(15.0))
    whole, = filled.split(9)
    assert (whole.n_tokens, whole.n_filler, whole.pieces) == (9, 0, (8, 3))
    first, second = filled.split(8)
    assert (first.pieces, second.pieces) == ((8,), (3,)) and second.weights.tolist() == [4, 5, 6, 7, 8]
    assert torch.equal(torch.cat([first.tokens, second.tokens]), batch.tokens[:9])
    assert torch.equal(torch.cat([first.labels, second.labels]), batch.labels[:9])


@pytest.mark.parametrize(("divisible", "what"), [(True, "a document of 8 tokens"), (False, "a row of 24 tokens")])
def test_where_nothing_can_be_less_the_error_says_with_what_and_the_run_is_kept(fakes, tmp_path, divisible, what):
    small, training = Small(fakes.objective, 24), Training(lr=0.05)

    class Tighter(Observer):
        def on_step(self, record):
            small.tokens = 7

    with pytest.raises(torch.OutOfMemoryError, match="you tried to allocate") as failed:
        fit(fakes.TinyModel(), rows(fakes), training, small, [Tighter()], divisible=divisible,
            checkpoints=checkpoints(tmp_path))
    first, second = failed.value.__notes__
    assert first.startswith(f"step 2: memory ran out with {what}: fewer tokens")
    assert second == "The run is kept as it was after step 1; resume goes on from there."
    assert steps(tmp_path / "checkpoint") == [1]


def test_a_product_for_which_onednn_has_no_memory_is_a_shortage(fakes):
    class Refused(Small):
        def __call__(self, model, batch):
            if batch.n_tokens > self.tokens:
                raise RuntimeError("could not create a primitive")
            return self.objective(model, batch)

    heard = Heard()
    run = fit(fakes.TinyModel(), rows(fakes), Training(), Refused(fakes.objective, 10), [heard], divisible=True)
    assert run.end == "finished" and "memory ran out with rows of 24 tokens" in heard.notes[-1]


def test_another_error_is_no_shortage(fakes):
    def fails(model, batch):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault") as failed:
        fit(fakes.TinyModel(), rows(fakes), Training(), fails, divisible=True)
    assert not hasattr(failed.value, "__notes__")


class Network:
    """As a model's network whose memory policy is to be chosen."""

    def __init__(self):
        self.policies = ["pointwise", "full"]

    def save_memory(self, tokens):
        return self.policies.pop(0) if self.policies else None

    def policy_of(self, tokens):
        return "full"


@pytest.mark.parametrize("at", [0, 2])
def test_what_is_drawn_again_is_what_was_drawn(fakes, at, monkeypatch):
    """With a cheaper memory policy the run is bit for bit that which has it from the start, dropout included."""
    training, straight, other = Training(lr=0.05), fakes.TinyModel(), fakes.TinyModel()
    other.network, heard, done, left = Network(), Heard(), [], [1, 1]
    monkeypatch.setattr("minitune.training.loop.hints", lambda *_: [])
    expected = train(fakes, straight, rows(fakes), training)

    def twice_out_of_memory(model, batch):
        found = dropped(model, batch)
        if len(done) == at and left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(batch)
        return found

    run = fit(other, rows(fakes), training, twice_out_of_memory, [heard])
    assert run.losses == expected.losses and torch.equal(other.B, straight.B)
    assert [note.partition(" is ")[2].partition(" from ")[0] for note in heard.notes] == ["pointwise", "full"]
    assert all(note.startswith(f"step {at + 1}: memory ran out") for note in heard.notes)
