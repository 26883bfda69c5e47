"""A run that goes on from a checkpoint is the one that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from minitune.config import Training
from minitune.training import checkpoint, loop, runner
from minitune.training.checkpoint import Checkpoints, Saved, read
from minitune.training.loop import TrainingDiverged, fit
from minitune.training.run import Observer
from tests.training.stopping import Epochs, Stop, checkpoints, data, dropped, seen, train


def same(a, b, model, other):
    plain = [[(r.step, r.loss, r.grad_norm, r.lr, r.n_tokens, r.n_trained) for r in run.records] for run in (a, b)]
    assert plain[0] == plain[1] and a.evaluations == b.evaluations and a.end == b.end == "finished"
    assert torch.equal(model.A, other.A) and torch.equal(model.B, other.B)


SETTINGS = {
    "plain": {}, "8bit": {"moments": "8bit"}, "sgd": {"optimizer": "sgd"}, "wsd": {"schedule": "wsd"},
    "no momentum": {"optimizer": "sgd", "momentum": 0.0}, "pairs": {"micro_batches": 2},
    "steps": {"max_steps": 14, "micro_batches": 3}}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("after", [1, 4, 6])
@pytest.mark.parametrize("kind", [list, Epochs])
def test_an_interrupted_run_goes_on_bit_for_bit(fakes, tmp_path, settings, after, kind):
    training = Training(**{"lr": 0.05, "epochs": 3, "evaluate_every": 3, **SETTINGS[settings]})
    straight, model = fakes.TinyModel(lr_ratio=4.0), fakes.TinyModel(lr_ratio=4.0)
    expected = train(fakes, straight, kind(data(fakes)), training, evaluate=seen)
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        train(fakes, model, kind(data(fakes)), training, evaluate=seen, observers=[stop],
              checkpoints=checkpoints(tmp_path))
    assert (stop.run.end, stop.run.checkpoint) == ("interrupted", after)
    saved, other = read(tmp_path / "checkpoint"), fakes.TinyModel(lr_ratio=4.0, seed=9)
    other.table.data.copy_(straight.table)
    torch.randn(99)
    batches = kind(data(fakes))
    run = train(fakes, other, batches, training, evaluate=seen, start=saved)
    assert (saved.step, saved.about) == (after, {"purpose": "a test"})
    same(expected, run, straight, other)
    if kind is Epochs and after * training.micro_batches > 5:
        assert 0 not in batches.made, "an epoch that was done is made again"


@pytest.mark.parametrize("lag", [0, 1])
def test_the_last_of_the_checkpoints_on_the_way_is_kept(fakes, tmp_path, monkeypatch, lag):
    if lag:     # as on a GPU
        made = runner.Runner.__init__
        monkeypatch.setattr(runner.Runner, "__init__", lambda self, *a: (made(self, *a), setattr(self, "lag", 1))[0])
    training = Training(lr=0.05, epochs=3, evaluate_every=4, save_every=4)
    straight, other = fakes.TinyModel(), fakes.TinyModel()
    expected = train(fakes, straight, data(fakes), training, evaluate=seen)
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), training, evaluate=seen, checkpoints=checkpoints(tmp_path),
              observers=[Stop(11, ValueError, tmp_path / "checkpoint")])
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        f"step-{number}.{end}" for number in (4, 8) for end in ("json", "safetensors")}
    assert read(tmp_path / "checkpoint").step == 11 + lag
    saved = read(tmp_path / "copy")
    assert saved.step == 8 and [e.step for e in saved.evaluations] == [0, 4, 8]
    same(expected, train(fakes, other, data(fakes), training, evaluate=seen, start=saved), straight, other)


def test_a_run_may_be_interrupted_again_and_again(fakes, tmp_path):
    training, straight = Training(lr=0.05, epochs=2, micro_batches=2), fakes.TinyModel()
    expected, saved = train(fakes, straight, data(fakes), training), None
    for after in (1, 3, 5):
        other, kept = fakes.TinyModel(), checkpoints(tmp_path, None if saved is None else saved.step)
        with pytest.raises(KeyboardInterrupt):
            train(fakes, other, data(fakes), training, checkpoints=kept, observers=[Stop(after)], start=saved)
        saved = read(tmp_path / "checkpoint")
    assert saved.step == 5      # the last one: what is left is to end
    same(expected, train(fakes, other, data(fakes), training, start=saved), straight, other)


def test_an_evaluation_behind_the_checkpoint_of_its_step_is_kept_too(fakes, tmp_path):
    """Resumed with an evaluation at the step that the run stands at, and stopped again before the next one is done."""
    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), Training(epochs=2), observers=[Stop(4)], evaluate=seen,
              checkpoints=checkpoints(tmp_path))
    calls = []

    def stopped(model, batch):
        calls.append(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(fakes.TinyModel(), data(fakes), Training(epochs=2, evaluate_every=4), stopped, evaluate=seen,
            start=read(tmp_path / "checkpoint"), checkpoints=checkpoints(tmp_path, 4))
    saved = read(tmp_path / "checkpoint")
    assert saved.step == 4 and [each.step for each in saved.evaluations] == [0, 1, 2, 3, 4] and len(calls) == 1


@pytest.mark.parametrize(("at", "then"), [(4, [4, 8, 10]), (10, [10])])
@pytest.mark.parametrize("told", [False, True])
def test_an_evaluation_that_was_interrupted_is_done_again_and_one_that_was_not_is_not(fakes, tmp_path, at, then, told):
    training = Training(lr=0.05, epochs=2, evaluate_every=4)
    straight, other, asked = fakes.TinyModel(), fakes.TinyModel(), []
    expected = train(fakes, straight, data(fakes), training, evaluate=seen)

    def impatient(step, end):
        if step == at and not told:
            raise KeyboardInterrupt
        return seen(step, end)

    class Impatient(Observer):
        """As one that keeps the best weights, and has not done so yet."""

        def on_evaluation(self, record):
            if record.step == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), training, evaluate=impatient, observers=[Impatient()],
              checkpoints=checkpoints(tmp_path))
    run = train(fakes, other, data(fakes), training, start=read(tmp_path / "checkpoint"),
                evaluate=lambda step, end: (asked.append(step), seen(step, end))[1])
    same(expected, run, straight, other)
    assert asked == then


@pytest.mark.parametrize("where", ["update", "gradients", "record"])
def test_ctrl_c_in_the_middle_of_a_step_leaves_a_whole_one(fakes, tmp_path, monkeypatch, where):
    training, calls = Training(lr=0.05, epochs=2, micro_batches=2), []
    straight, other = fakes.TinyModel(), fakes.TinyModel()
    expected = train(fakes, straight, data(fakes), training)

    def then_ctrl_c(name, place):
        real = getattr(place, name)

        def called(*given, **named):
            calls.append(name)
            found = real(*given, **named)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            return found

        return called

    name, place = {"update": ("clip_grad_norm", "minitune.training.step"), "record": ("peak_memory", runner.__name__),
                   "gradients": ("gradients", runner.__name__)}[where]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        module = runner if place == runner.__name__ else __import__(place, fromlist=["step"])
        patched.setattr(module, name, then_ctrl_c(name, module))
        train(fakes, fakes.TinyModel(), data(fakes), training, checkpoints=checkpoints(tmp_path))
    saved = read(tmp_path / "checkpoint")
    assert saved.step == (2 if where == "gradients" else 3)
    same(expected, train(fakes, other, data(fakes), training, start=saved), straight, other)


def test_an_error_within_an_update_writes_no_checkpoint(fakes, tmp_path, monkeypatch):
    whole, steps = loop.AdamW.step, []

    def torn(self, *_):
        steps.append(self)
        if len(steps) == 4:
            self.param_groups[0]["params"][0].data.add_(1)
            raise RuntimeError("out of memory")
        return whole(self)

    monkeypatch.setattr(loop.AdamW, "step", torn)
    stop = Stop(99)
    with pytest.raises(RuntimeError, match="out of memory") as ended:
        train(fakes, fakes.TinyModel(), data(fakes), Training(save_every=2), checkpoints=checkpoints(tmp_path),
              observers=[stop])
    assert ended.value.__notes__[0] == (
        "Step 4 broke off within its update: what was trained has a part of it, and the weights of step 2 take its "
        "place.")
    assert read(tmp_path / "checkpoint").step == 2 and (stop.run.end, stop.run.checkpoint) == ("failed", 2)


def test_a_checkpoint_that_cannot_be_written_is_told_of_and_the_last_one_stays(fakes, tmp_path, monkeypatch):
    class Notes(Observer):
        told = ()

        def on_note(self, text):
            self.told += (text,)

    real, notes, renamed = os.replace, Notes(), []

    def full(source, target):
        renamed.append(target)
        if len(renamed) == 4:       # the JSON of the second checkpoint: its tensors have their name already
            raise OSError(28, "No space left on device", str(target))
        return real(source, target)

    monkeypatch.setattr("os.replace", full)
    training = Training(lr=0.05, epochs=3, save_every=4)
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), training, checkpoints=checkpoints(tmp_path),
              observers=[notes, Stop(10, ValueError, tmp_path / "checkpoint")])
    assert [note for note in notes.told if "No space left" in note and "step 8: no checkpoint" in note
            and "that of step 4 stays" in note]
    straight, other = fakes.TinyModel(), fakes.TinyModel()
    expected, saved = train(fakes, straight, data(fakes), training), read(tmp_path / "copy")
    assert saved.step == 4
    same(expected, train(fakes, other, data(fakes), training, start=saved), straight, other)


def test_after_a_divergence_the_last_checkpoint_takes_the_place_of_what_is_spoilt(fakes, tmp_path):
    model, stop = fakes.TinyModel(), Stop(99)
    weights = {}

    class Spoil(Observer):
        def on_step(self, record):
            weights[record.step] = model.A.detach().clone()
            if record.step == 7:
                model.B.data.fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match=r"step 8: .* those of the checkpoint after step 6 take their place and "
                                               r"are saved in .*adapter: go on from there in a new run, with a lower"):
        fit(model, data(fakes), Training(epochs=3, save_every=3), dropped, [Spoil(), stop],
            checkpoints=checkpoints(tmp_path))
    assert (stop.run.end, stop.run.restored, stop.run.checkpoint) == ("diverged", 6, None)
    assert torch.equal(model.A, weights[6]) and read(tmp_path / "checkpoint").step == 6


def test_spoilt_weights_are_in_no_checkpoint(fakes, tmp_path):
    model = fakes.TinyModel()

    class Spoil(Observer):
        def on_step(self, record):
            if record.step == 3:
                model.A.data.fill_(float("nan"))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fakes, model, data(fakes), Training(save_every=2), observers=[Spoil()],
              checkpoints=checkpoints(tmp_path))
    assert read(tmp_path / "checkpoint").step == 2


def test_a_run_that_goes_on_knows_that_it_diverges(fakes, tmp_path):
    def rising(done):
        steps = iter(range(done, 99))

        def objective(model, batch):
            loss, n = dropped(model, batch)
            return loss + n * (0 if next(steps) < 2 else 9), n

        return objective

    def run(done, **how):
        return fit(fakes.TinyModel(), data(fakes), Training(epochs=3), rising(done), chance=2.4, **how)

    expected = run(0)
    with pytest.raises(KeyboardInterrupt):
        run(0, checkpoints=checkpoints(tmp_path), observers=[Stop(9)])
    again = run(9, start=read(tmp_path / "checkpoint"))
    assert again.losses == expected.losses and again.diverging == expected.diverging == 5


def test_observers_hear_that_a_run_goes_on(fakes, tmp_path):
    class Old:
        """An observer of before there was anything to resume."""

        heard = ()

        def on_start(self, info):
            self.heard += (info.total_steps,)

    class Inherits(Observer):
        heard = ()

        def on_start(self, info):
            self.heard += (info.total_steps,)

    class New(Observer):
        heard = ()

        def on_resume(self, run):
            self.heard += (len(run.records), [e.step for e in run.evaluations])

    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), Training(), evaluate=seen, observers=[Stop(3)],
              checkpoints=checkpoints(tmp_path))
    saved = read(tmp_path / "checkpoint")
    assert isinstance(saved, Saved)
    observers = [Old(), Inherits(), New()]
    train(fakes, fakes.TinyModel(), data(fakes), Training(), evaluate=seen, observers=observers, start=saved)
    assert [each.heard for each in observers] == [(5,), (5,), (3, [0, 1, 2])]
    checkpoint.remove(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("where", ["checkpoint", "end"])
def test_a_second_ctrl_c_waits_until_all_is_saved(fakes, tmp_path, monkeypatch, where):
    done = []

    class Ends(Stop):
        def on_end(self, run):
            if where == "end":
                signal.raise_signal(signal.SIGINT)
            done.append(run.checkpoint)

    write = Checkpoints.write

    def interrupted(self, *args):
        if where == "checkpoint":
            signal.raise_signal(signal.SIGINT)
        write(self, *args)

    monkeypatch.setattr(Checkpoints, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), Training(epochs=2, lr=0.05), observers=[Ends(3)],
              checkpoints=checkpoints(tmp_path))
    assert done == [3] and read(tmp_path / "checkpoint").step == 3


def test_an_update_that_is_broken_off_leaves_the_weights_of_the_last_checkpoint(fakes, tmp_path, monkeypatch):
    other, heard, kept = fakes.TinyModel(), Stop(99), checkpoints(tmp_path)
    real, saved = runner.update, {}

    def breaks(optimizer, *given):
        norm = real(optimizer, *given)
        if kept.step == 2:
            raise RuntimeError("a fault in the middle")
        return norm

    def seen(record):
        if record.step == 2:
            saved["B"] = other.B.detach().clone()

    heard.on_step = seen
    monkeypatch.setattr(runner, "update", breaks)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(fakes, other, data(fakes), Training(lr=0.05, save_every=2), observers=[heard], checkpoints=kept)
    assert heard.run.restored == heard.run.checkpoint == 2 and torch.equal(other.B, saved["B"])
