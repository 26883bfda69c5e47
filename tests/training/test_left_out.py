"""Steps whose loss or gradient is not finite: left out, told with their documents; too many in a row end the run."""

from __future__ import annotations

import math

import pytest
import torch

from minitune.config import Training
from minitune.errors import InputError
from minitune.training.checkpoint import Checkpoints, read, steps
from minitune.training.left_out import LeftOut
from minitune.training.loop import TrainingDiverged, fit
from minitune.training.run import Observer, StepRecord


class Listener(Observer):
    def __init__(self):
        self.notes, self.steps, self.run = [], [], None

    def on_note(self, text):
        self.notes.append(text)

    def on_step(self, record):
        self.steps.append(record.step)

    def on_end(self, run):
        self.run = run


def data(fakes, n=12):
    batches = [fakes.make_batch(12, 7 + i, seed=i) for i in range(n)]
    for i, batch in enumerate(batches):
        object.__setattr__(batch, "pieces", (10 * i, 10 * i + 1))
    return batches


def spoils(*steps, by=math.nan):
    """An objective whose loss is spoilt in these steps (of one micro-batch each)."""
    calls = []

    def objective(model, batch):
        calls.append(batch)
        loss, n = model.loss_sum(batch)
        return loss * (by if len(calls) in steps else 1.0), n

    return objective


def test_a_document_that_is_two_of_a_row_is_named_once(fakes):
    """As both answers of a pair are."""
    batches, listener = data(fakes), Listener()
    object.__setattr__(batches[3], "pieces", (7, 7, 5, 5))
    fit(fakes.TinyModel(), batches, Training(), spoils(4), [listener])
    (note,) = [note for note in listener.notes if "left out" in note]
    assert note.endswith("; it read documents[7], documents[5]")


@pytest.mark.parametrize("by", [math.nan, math.inf, 3e38], ids=["nan", "inf", "gradient alone"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_step_is_left_out_and_told(fakes, by, optimizer):
    model, listener, weights = fakes.TinyModel(), Listener(), []
    listener.on_step = lambda record: weights.append(model.A.detach().clone())
    run = fit(model, data(fakes), Training(log_every=5, optimizer=optimizer), spoils(4, by=by), [listener])
    assert (run.end, run.skipped, len(run.records)) == ("finished", 1, 12)
    assert [r.step for r in run.records if r.left_out] == [4]
    (note,) = [note for note in listener.notes if "left out" in note]
    assert note.startswith("step 4: loss ") and note.endswith(
        ": left out, it changes no weight; it read documents[30], documents[31]")
    assert len(weights) == 5        # 1, 5, 10, 12, and the one that was left out
    again = fakes.TinyModel()
    expected = fit(again, data(fakes)[:3], Training(max_steps=3, warmup=1, optimizer=optimizer), fakes.objective)
    assert expected.losses == pytest.approx(run.losses[:3], rel=1e-3)


def test_what_follows_is_as_if_the_step_had_only_read(fakes):
    """Weights and moments after a step that was left out are those before it, bit for bit."""
    model = fakes.TinyModel()
    seen = {}

    class Look(Observer):
        def on_step(self, record):
            seen[record.step] = (model.A.detach().clone(), model.B.detach().clone())

    fit(model, data(fakes), Training(), spoils(3, 4), [Look()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(seen[2], seen[3], seen[4], strict=True))
    assert not torch.equal(seen[4][1], seen[5][1])


@pytest.mark.parametrize(("allowed", "last"), [(3, 6), (0, 3), (1, 4)])
def test_too_many_in_a_row_end_the_run_with_the_weights_before_them(fakes, allowed, last):
    model, listener = fakes.TinyModel(), Listener()
    model.eval()
    in_a_row = rf", the last of {allowed + 1} such steps in a row" if allowed else ""
    with pytest.raises(TrainingDiverged, match=rf"^step {last}: loss nan.*it changes no weight{in_a_row}; it read "
                       rf"documents\[{10 * last - 10}\].*The weights before them are kept; begin anew, without these "
                       r"samples or with a higher max_skipped, if it is they, else with a lower lr \(it is 0\.0002\)"):
        fit(model, data(fakes), Training(max_skipped=allowed), spoils(*range(3, 99)), [listener])
    assert listener.run.end == "diverged" and len(listener.run.records) == last and not model.training
    assert listener.steps == list(range(1, last + 1)) and len([n for n in listener.notes if "left" in n]) == allowed
    fit(other := fakes.TinyModel(), data(fakes), Training(max_skipped=99), spoils(*range(3, 99)))
    assert torch.equal(model.B, other.B) and bool(model.B.isfinite().all()) and bool(model.B.any())


def test_many_that_are_not_in_a_row_end_no_run(fakes):
    run = fit(fakes.TinyModel(), data(fakes), Training(max_skipped=1), spoils(1, 3, 5, 7, 9, 11))
    assert (run.end, run.skipped) == ("finished", 6)


@pytest.mark.parametrize(("clip", "advice"), [
    (0.0, r"a clip of 1 \(it is 0, which does not clip\)$"), (5.0, r"a clip of 1 \(it is 5\)$"),
    (1.0, r"a clip of 0\.1 \(it is 1\)$"), (0.5, r"a clip of 0\.05 \(it is 0\.5\)$")])
def test_another_clip_is_advised_than_there_was(fakes, clip, advice):
    with pytest.raises(TrainingDiverged, match=advice):
        fit(fakes.TinyModel(), data(fakes), Training(clip=clip, max_skipped=0), spoils(2))


@pytest.mark.parametrize("by", [math.nan, 3e38], ids=["loss", "gradient"])
def test_before_any_update_no_rate_is_blamed(fakes, by):
    with pytest.raises(TrainingDiverged, match=r"step 4: .* the last of 4 such steps in a row; .*\. No update came "
                       r"before, so the learning rate is not the cause: .* the objective, if it is your own"):
        fit(fakes.TinyModel(), data(fakes), Training(clip=0.0), spoils(*range(1, 99), by=by))


def test_weights_that_were_spoilt_before_the_first_step_end_the_run_at_once(fakes):
    model = fakes.TinyModel()
    model.A.data[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"^step 1: .*The trained weights are spoilt and are not saved\. No"):
        fit(model, data(fakes), Training(), fakes.objective)


def test_a_run_that_goes_on_counts_those_before_it(fakes, tmp_path):
    class Stop(Observer):
        def on_step(self, record):
            if record.step == 5:
                raise KeyboardInterrupt

    kept = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None)
    with pytest.raises(KeyboardInterrupt):
        fit(fakes.TinyModel(), data(fakes), Training(), spoils(4, 5), [Stop()], checkpoints=kept)
    with pytest.raises(TrainingDiverged, match=r"step 7: .* the last of 4 such steps in a row"):
        fit(fakes.TinyModel(), data(fakes), Training(), spoils(1, 2, 3), start=read(tmp_path / "checkpoint"))


def test_documents_are_named_up_to_five():
    record = StepRecord(step=9, loss=math.nan, lr=1e-4, grad_norm=2.0, n_trained=1, n_tokens=1, seconds=1,
                        left_out=True)
    watch = LeftOut(3, "my.jsonl:{}".format)
    watch.count(record)
    assert not watch.too_many
    assert watch.told(record, range(1, 6)).endswith("weight; it read my.jsonl:1, my.jsonl:2, my.jsonl:3, my.jsonl:4, "
                                                    "my.jsonl:5")
    assert watch.told(record, range(1, 8)).endswith("my.jsonl:5 and 2 more")
    assert watch.told(record, ()).endswith("it changes no weight")


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="max_skipped"):
        Training(max_skipped=value)


def test_no_checkpoint_is_written_behind_steps_that_were_left_out(fakes, tmp_path):
    """Their weights may be what is wrong: those of before stay."""
    kept = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None)
    with pytest.raises(TrainingDiverged):
        fit(fakes.TinyModel(), data(fakes), Training(max_skipped=2, save_every=1), spoils(*range(3, 99)),
            checkpoints=kept)
    assert steps(tmp_path / "checkpoint") == [2, 1]
