"""fit pauses to evaluate: at the right steps, without changing a number of the run, and it ends honestly."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from minitune.config import Training
from minitune.training import runner
from minitune.training.checkpoint import Checkpoints, read
from minitune.training.loop import fit
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo


class Evaluating(Observer):
    """An evaluation that notes when it was called and how the model stood; an observer of what follows."""

    def __init__(self, model, losses=()) -> None:
        self.model, self.losses, self.calls, self.heard = model, list(losses), [], []

    def __call__(self, step, is_last):
        loss = self.losses.pop(0) if self.losses else 1.0
        self.calls.append((step, is_last(loss), self.model.training))
        return EvaluationRecord(step=step, seconds=0.1, loss=loss)

    def on_step(self, record):
        self.heard.append(record.step)

    def on_evaluation(self, record):
        self.heard.append(f"seen {record.step}")


def data(fakes, n=6):
    return [fakes.make_batch(12, 7 + i, seed=i) for i in range(n)]


@pytest.mark.parametrize("lag", [0, 1])
def test_evaluations_come_between_steps_that_are_all_told(fakes, monkeypatch, lag):
    model = fakes.TinyModel()
    if lag:     # as on a GPU
        made = runner.Runner.__init__
        monkeypatch.setattr(runner.Runner, "__init__", lambda self, *a: (made(self, *a), setattr(self, "lag", 1))[0])
    evaluating = Evaluating(model)
    run = fit(model, data(fakes), Training(evaluate_every=4, epochs=2), fakes.objective, [evaluating],
              evaluate=evaluating)
    assert evaluating.calls == [(0, True, False), (4, False, False), (8, False, False), (12, True, False)]
    assert evaluating.heard == ["seen 0", 1, 2, 3, 4, "seen 4", 5, 6, 7, 8, "seen 8", 9, 10, 11, 12, "seen 12"]
    assert [e.step for e in run.evaluations] == [0, 4, 8, 12]
    plain = fit(fakes.TinyModel(), data(fakes), Training(evaluate_every=4, epochs=2), fakes.objective)
    assert plain.losses == run.losses and plain.evaluations == []


def test_a_run_that_says_nothing_is_evaluated_about_ten_times(fakes):
    model = fakes.TinyModel()
    evaluating = Evaluating(model)
    fit(model, data(fakes), Training(max_steps=25), fakes.objective, evaluate=evaluating)
    assert [step for step, _, _ in evaluating.calls] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]


def test_data_that_ends_early_is_evaluated_once_more_at_its_last_step(fakes):
    model = fakes.TinyModel()
    evaluating = Evaluating(model)
    fit(model, iter(data(fakes)), Training(max_steps=100, evaluate_every=3), fakes.objective, evaluate=evaluating)
    assert [(step, end) for step, end, _ in evaluating.calls] == [(0, True), (3, False), (6, True)]


@pytest.mark.parametrize(("losses", "patience", "last"), [
    ([9, 3, 2, 2, 2.5], 2, 4), ([9, 3, 1, 2, 2, 2], 3, 5), ([1, 3, 3], 1, 2), ([9, 1, math.nan], 1, 2),
    ([9, 6, 5, 4, 3, 2, 1], 1, 6), ([9, 1, 2, 2], 9, 6)])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_ends_when_the_validation_loss_falls_no_more(fakes, monkeypatch, losses, patience, last, lag):
    """Questions are asked at that evaluation, as at any last one."""
    if lag:
        made = runner.Runner.__init__
        monkeypatch.setattr(runner.Runner, "__init__", lambda self, *a: (made(self, *a), setattr(self, "lag", 1))[0])
    model = fakes.TinyModel()
    evaluating = Evaluating(model, losses)
    run = fit(model, data(fakes), Training(evaluate_every=1, patience=patience, log_every=9), fakes.objective,
              [evaluating], evaluate=evaluating)
    assert (run.end, len(run.records), run.done) == ("finished" if last == 6 else "stopped early", last, True)
    assert [(step, end) for step, end, _ in evaluating.calls] == [(i, i in (0, last)) for i in range(last + 1)]
    assert set(evaluating.heard[-2:]) == {last, f"seen {last}"}


def test_a_run_that_goes_on_counts_the_evaluations_before(fakes, tmp_path):
    class Stop(Observer):
        def on_evaluation(self, record):
            if record.step == 2:
                raise KeyboardInterrupt

    how, kept = Training(evaluate_every=1, patience=3), Checkpoints(tmp_path / "c", dict, tmp_path / "adapter", None)
    with pytest.raises(KeyboardInterrupt):
        fit(model := fakes.TinyModel(), data(fakes), how, fakes.objective, [Stop()],
            evaluate=Evaluating(model, [9, 1, 2]), checkpoints=kept)
    again = Evaluating(model := fakes.TinyModel(), [2, 2, 2])
    run = fit(model, data(fakes), how, fakes.objective, evaluate=again, start=read(tmp_path / "c"))
    assert run.end == "stopped early" and len(run.records) == 4 and [e.loss for e in run.evaluations] == [9, 1, 2, 2, 2]


def test_an_evaluation_with_nothing_to_do_leaves_no_record(fakes):
    run = fit(fakes.TinyModel(), data(fakes), Training(), fakes.objective, evaluate=lambda step, end: None)
    assert run.evaluations == []


def test_time_spent_evaluating_is_no_time_of_a_step(fakes, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def objective(model, batch):
        now[0] += 2.0
        return fakes.objective(model, batch)

    def slow(step, end):
        now[0] += 1000.0
        return EvaluationRecord(step=step, seconds=1000.0)

    run = fit(fakes.TinyModel(), data(fakes), Training(evaluate_every=1), objective, evaluate=slow)
    assert len(run.evaluations) == 7 and [record.seconds for record in run.records] == [2.0] * 6


def test_the_best_is_the_lowest_finite_loss_after_training_began():
    info = RunInfo(total_steps=4, n_parameters=1, device="cpu", training=Training())

    def best(*losses):
        run = Run(info=info, evaluations=[EvaluationRecord(step=i, seconds=0, loss=x) for i, x in enumerate(losses)])
        return None if run.best is None else run.best.step

    assert best(0.1, 2.0, 1.0, 1.0) == 2
    assert best(0.1, float("nan"), 3.0) == 2
    assert best(0.1) is None and best() is None and best(0.1, None) is None


def test_every_observer_hears_of_the_end_even_if_one_fails(fakes):
    ended = []

    class Broken(Observer):
        def on_end(self, run):
            ended.append("broken")
            raise OSError("disk full")

    class Good(Observer):
        def on_end(self, run):
            ended.append(run.end)

    with pytest.raises(OSError, match="disk full"):
        fit(fakes.TinyModel(), data(fakes), Training(), fakes.objective, [Broken(), Good()])
    assert ended == ["broken", "finished"]
