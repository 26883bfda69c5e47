"""Spikes: told, left out, or the end of a run, by the steps before them alone, and the same in a run that goes on."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import minitune.training.clip
import minitune.training.optimizers
import minitune.training.step
from minitune.config import Training
from minitune.errors import InputError
from minitune.training.checkpoint import Checkpoints, read, steps
from minitune.training.loop import TrainingDiverged, fit
from minitune.training.run import Observer, StepRecord
from minitune.training.runner import Runner
from minitune.training.spikes import LEAST, NONE, SIGMAS, WINDOW, Limits, Window

LATE = LEAST + 8
"""The step that is spoilt."""


class Listener(Observer):
    def __init__(self, stop=0):
        self.notes, self.stop = [], stop

    def on_note(self, text):
        self.notes.append(text)

    def on_step(self, record):
        if record.step == self.stop:
            raise KeyboardInterrupt


class Dying(Observer):
    """Ends the run at a step, where the newest checkpoint must be that of `expected`."""

    def __init__(self, step, folder, expected):
        self.step, self.folder, self.expected = step, folder, expected

    def on_step(self, record):
        if record.step == self.step:
            raise ValueError("stopped" if steps(self.folder)[0] == self.expected else f"{steps(self.folder)}")


def data(fakes, n=LATE + 8):
    batches = [fakes.make_batch(12, 7 + i % 9, seed=i) for i in range(n)]
    for i, batch in enumerate(batches):
        object.__setattr__(batch, "pieces", (i,))
    return batches


def spoils(*steps, by=30.0, done=0):
    """An objective whose loss, and with it the gradient, is so many times as high in these steps."""
    calls = [None] * done

    def objective(model, batch):
        calls.append(batch)
        loss, n = model.loss_sum(batch)
        return loss * (by if len(calls) in steps else 1.0), n

    return objective


def trained(fakes, training, objective, **options):
    """(weights, run) of a run of 48 steps, of which one is spoilt."""
    model = fakes.TinyModel()
    run = fit(model, data(fakes), training, objective, **options)
    return [model.A.detach(), model.B.detach()], run


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def record(step, loss=1.0, grad_norm=1.0, left_out=False):
    return StepRecord(step=step, loss=loss, lr=1e-4, grad_norm=grad_norm, n_trained=1, n_tokens=1, seconds=1.0,
                      left_out=left_out)


def limits(records, seen):
    return Window().limits(records, seen)


def test_the_limits_are_six_standard_deviations_above_the_mean_of_the_window():
    losses = [3 + 0.7 * math.sin(i * i) for i in range(200)]
    norms = [1 + 0.3 * math.cos(i * i) for i in range(200)]
    records = [record(i + 1, *both) for i, both in enumerate(zip(losses, norms, strict=True))]
    found = limits(records, 200)
    for value, series in ((found.loss, losses[-WINDOW:]), (found.grad_norm, norms[-WINDOW:])):
        assert value == pytest.approx(statistics.fmean(series) + SIGMAS * statistics.pstdev(series), rel=1e-6)
        assert value == float(torch.tensor(value))      # as the device compares
    spoilt = [*records, *(record(201 + i, 1e9, math.nan, left_out=True) for i in range(50))]
    assert limits(spoilt, 250) == limits(spoilt, 201) == found


@pytest.mark.parametrize("left_out", [False, True])
def test_a_spike_counts_as_the_limit_that_it_is_above(left_out):
    """However high, and also where it is taken: it hides no step behind it. Steps that keep coming raise the limit."""
    calm = [record(i + 1, 2 + 0.1 * math.sin(i * i), 1 + 0.1 * math.cos(i * i)) for i in range(WINDOW)]
    first = limits(calm, WINDOW)
    for height in (1.01 * first.loss, 1e30):
        found = limits([*calm, record(WINDOW + 1, height, 1.0, left_out=left_out)], WINDOW + 1)
        as_limit = limits([*calm, record(WINDOW + 1, first.loss, 1.0)], WINDOW + 1)
        assert found == as_limit and first.loss < found.loss < 1.1 * first.loss
    window, records, needed = Window(), list(calm), 0
    while window.limits(records, len(records)).loss < 3 * first.loss:
        records.append(record(len(records) + 1, 1e30, 1.0, left_out=left_out))
        needed += 1
    assert 10 < needed < 40 and window.limits(records, len(records)) == limits(records, len(records))


@pytest.mark.parametrize("spikes", ["warn", "skip"])
def test_after_a_huge_spike_a_smaller_one_is_still_seen(fakes, spikes):
    heights = {LATE: 1e5, LATE + 3: 30.0}
    calls = []

    def objective(model, batch):
        calls.append(batch)
        loss, n = model.loss_sum(batch)
        return loss * heights.get(len(calls), 1.0), n

    listener = Listener()
    run = trained(fakes, Training(spikes=spikes, lr=1e-6), objective, observers=[listener])[1]
    assert [r.step for r in run.records if r.left_out] == ([LATE, LATE + 3] if spikes == "skip" else [])
    assert [note.partition(":")[0] for note in listener.notes if "a spike" in note] == [
        f"step {LATE}", f"step {LATE + 3}"]


def test_few_steps_have_no_limit_and_quiet_ones_no_low_one():
    assert limits([], 0) == limits([], -1) == limits([record(i) for i in range(LEAST)], LEAST - 1) == NONE
    assert limits([record(i, -2.0) for i in range(LEAST)], LEAST) == Limits(pytest.approx(-1.4), pytest.approx(1.3))


@pytest.mark.parametrize(("loss", "norm", "held"), [(1, 2, True), (1.01, 2, False), (1, 2.01, False),
                                                    (math.nan, 1, False), (1, math.inf, False), (9, math.nan, False)])
def test_what_is_held_and_what_is_told(loss, norm, held):
    found = Limits(1.0, 2.0)
    assert bool(found.hold(torch.tensor(loss), torch.tensor(norm))) is held
    assert bool(found.told(loss, norm)) is (not held and math.isfinite(loss + norm))
    assert found.told(5, 7) == "a spike, loss above 1 and gradient norm above 2" and not NONE.told(5, math.inf)


def test_a_second_spike_right_behind_the_one_that_ends_the_run_is_told_too(fakes, tmp_path, monkeypatch):
    """Where a step's numbers are read one step late, as on a GPU."""
    for module in (minitune.training.clip, minitune.training.optimizers, minitune.training.step):
        monkeypatch.setattr(module, "asks", lambda device: False)
    monkeypatch.setattr(Runner, "lag", property(lambda self: 1, lambda self, value: None), raising=False)
    kept = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None)
    with pytest.raises(TrainingDiverged, match=rf"step {LATE}: .*spikes is stop") as end:
        trained(fakes, Training(spikes="stop"), spoils(LATE, LATE + 1), checkpoints=kept)
    assert steps(tmp_path / "checkpoint") == [LATE + 1]
    assert rf"step {LATE + 1}: loss " in end.value.__notes__[0] and f"documents[{LATE}]" in end.value.__notes__[0]


def test_by_default_a_spike_is_told_of_with_what_it_read_and_taken(fakes):
    listener = Listener()
    weights, run = trained(fakes, Training(), spoils(LATE), observers=[listener])
    (note,) = [note for note in listener.notes if "spike" in note]
    assert note.startswith(f"step {LATE}: loss ") and note.endswith(f"; it read documents[{LATE - 1}]")
    assert ": a spike, loss above " in note and "gradient norm above" in note and "left out" not in note
    assert run.skipped == 0 and not same(weights, trained(fakes, Training(spikes="skip"), spoils(LATE))[0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_spike_that_is_skipped_changes_nothing(fakes, optimizer, clip):
    """Weights are those of a run whose loss in that step is NaN."""
    how, listener = Training(spikes="skip", optimizer=optimizer, clip=clip), Listener()
    weights, run = trained(fakes, how, spoils(LATE), observers=[listener])
    assert [r.step for r in run.records if r.left_out] == [LATE] and run.end == "finished"
    assert any("gradient norm above" in note and note.endswith(
        f", left out, it changes no weight; it read documents[{LATE - 1}]") for note in listener.notes)
    assert same(weights, trained(fakes, how, spoils(LATE, by=math.nan))[0])
    assert not same(weights, trained(fakes, how, spoils())[0])


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_device_that_is_not_asked_skips_it_too(fakes, monkeypatch, clip):
    how = Training(spikes="skip", optimizer="sgd", clip=clip)       # whose state has no count of steps
    expected, _ = trained(fakes, how, spoils(LATE))
    for module in (minitune.training.clip, minitune.training.optimizers, minitune.training.step):
        monkeypatch.setattr(module, "asks", lambda device: False)
    weights, run = trained(fakes, how, spoils(LATE))
    assert run.skipped == 1 and same(weights, expected)


def test_a_spike_ends_the_run_which_can_go_on_behind_it(fakes, tmp_path):
    kept, listener = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None), Listener()
    with pytest.raises(TrainingDiverged, match=rf"step {LATE}: .*a spike, .*It ends the run, as spikes is stop") as end:
        trained(fakes, Training(spikes="stop"), spoils(LATE), observers=[listener], checkpoints=kept)
    assert steps(tmp_path / "checkpoint") == [LATE]
    assert f"kept as it was after step {LATE}; resume" in "".join(end.value.__notes__)
    weights, run = trained(fakes, Training(spikes="stop"), spoils(done=LATE), start=read(tmp_path / "checkpoint"))
    assert run.skipped == 1 and run.records[LATE - 1].left_out
    assert same(weights, trained(fakes, Training(spikes="skip"), spoils(LATE))[0])


def test_without_a_folder_it_ends_the_run_all_the_same(fakes):
    with pytest.raises(TrainingDiverged, match="spikes is stop"):
        trained(fakes, Training(spikes="stop"), spoils(LATE))


@pytest.mark.parametrize("before", [1, 5, LEAST])
def test_the_window_survives_resuming(fakes, tmp_path, before):
    how = Training(spikes="skip")
    kept = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None)
    with pytest.raises(KeyboardInterrupt):
        trained(fakes, how, spoils(LATE), observers=[Listener(stop=LATE - before)], checkpoints=kept)
    start = read(tmp_path / "checkpoint")
    weights, run = trained(fakes, how, spoils(LATE, done=start.step), start=start)
    assert [r.step for r in run.records if r.left_out] == [LATE]
    assert same(weights, trained(fakes, how, spoils(LATE))[0])


@pytest.mark.parametrize("most", [3, 40])
def test_a_loss_that_rises_for_good_ends_the_run_or_is_followed(fakes, most):
    """By default it ends; where more steps may be left out in a row, the limit has followed before all were."""
    how, objective = Training(spikes="skip", max_skipped=most), spoils(*range(LATE, 999))
    model = fakes.TinyModel()
    if most == 3:
        with pytest.raises(TrainingDiverged, match=rf"^step {LATE + 3}: .*the last of 4 such steps in a row"):
            fit(model, data(fakes, 100), how, objective)
        return
    run = fit(model, data(fakes, 100), how, objective)
    assert run.end == "finished" and 4 < run.skipped < 40 and not any(r.left_out for r in run.records[-10:])


def test_too_many_in_a_row_end_the_run_which_can_go_on(fakes, tmp_path):
    kept = Checkpoints(tmp_path / "checkpoint", dict, tmp_path / "adapter", None)
    with pytest.raises(TrainingDiverged, match=rf"^step {LATE + 1}: .*a spike, .*the last of 2 such steps in a row.*"
                                               "resume, with spikes=warn"):
        trained(fakes, Training(spikes="skip", max_skipped=1), spoils(*range(LATE, 99)), checkpoints=kept)
    start = read(tmp_path / "checkpoint")
    assert start.step == LATE + 1
    assert trained(fakes, Training(), spoils(done=LATE + 1), start=start)[1].end == "finished"


def test_a_checkpoint_that_is_due_is_kept_behind_a_spike_but_not_behind_a_nan(fakes, tmp_path):
    for name, by, expected in (("spike", 30.0, LATE), ("nan", math.nan, LATE - 20)):
        kept = Checkpoints(tmp_path / name, dict, tmp_path / "adapter", None)
        with pytest.raises(ValueError, match="stopped"):
            trained(fakes, Training(spikes="skip", save_every=20), spoils(LATE, by=by), checkpoints=kept,
                    observers=[Dying(LATE + 1, tmp_path / name, expected)])


def test_a_word_that_is_none_is_refused():
    with pytest.raises(InputError, match="spikes"):
        Training(spikes="ignore")
