"""What a run is told before its first step, and once when its loss rises far above where it began."""

from __future__ import annotations

import math

import pytest
import torch

from minitune.config import LoRA, ModelConfig, Training
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.training.hints import EARLY, NO_GRADIENT, WINDOW, Divergence, hints
from minitune.training.loop import fit
from minitune.training.run import Observer
from minitune.training.schedule import learning_rate

CPU = torch.device("cpu")


class Rows:
    """As much of a stream as says how full its rows are."""

    def __init__(self, n_tokens: int, n_filler: int) -> None:
        self.tokens, self.n_tokens, self.n_filler = 64, n_tokens, n_filler


def test_a_warmup_as_long_as_the_run_is_told() -> None:
    settings = {"tokens": 64, "max_steps": 5}
    for schedule, highest in (("cosine", 4), ("constant", 5)):
        training = Training(warmup=100, schedule=schedule, **settings)
        (found,) = hints(Rows(10, 0), training, 5, CPU)
        assert found == f"warmup is 100 steps, and the run has 5; the rate reaches lr in step {highest}"
        rates = [learning_rate(step, 5, training) for step in range(5)]
        assert rates.index(training.lr) == highest - 1
    assert not hints(Rows(10, 0), Training(warmup=4, **settings), 5, CPU)
    assert not hints(Rows(10, 0), Training(warmup=0.5, **settings), 5, CPU)


@pytest.mark.parametrize(("dtype", "train", "settings", "told"), [
    (torch.bfloat16, "norms", {"lr": 1e-5}, True), (torch.bfloat16, "norms", {"lr": 1e-3}, False),
    (torch.float32, "norms", {"lr": 1e-5}, False), (torch.bfloat16, None, {"lr": 1e-5}, False),
    (torch.bfloat16, "full", {"lr": 1e-5}, False), (torch.bfloat16, "full", {"lr": 1e-7}, True),
    (torch.bfloat16, "norms", {"lr": 1e-5, "optimizer": "sgd"}, False)], ids=str)
def test_steps_too_small_for_the_dtype_that_weights_are_read_in_are_told(dtype, train, settings, told) -> None:
    """A value of 1 has its next number of bfloat16 at 1 - 1/256."""
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48)
    network = Llama(config, dtype=dtype)
    init_weights(network, seed=1)
    network.add_adapters(LoRA(rank=2), seed=1) if train is None else network.unfreeze(train)
    found = hints(Rows(10, 0), Training(tokens=64, max_steps=20, **settings), 20, CPU, network)
    assert len(found) == told
    if told:
        assert "of the trained base weights stay, rounded to bfloat16, what they are" in found[0]
        assert f"20 steps of lr {settings['lr']:g} do not reach the next number" in found[0]


class Notes(Observer):
    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_start(self, info):
        self.heard.append("start")

    def on_note(self, text):
        self.heard.append(text)

    def on_step(self, record):
        self.heard.append(record.step)


@pytest.mark.parametrize(("steps", "settings", "words"), [
    (1, {"tokens": 64}, "only 1 optimizer step, in which hardly anything is learned; fewer tokens a row or more epochs "
                        "make more (tokens is 64, epochs 1)"),
    (9, {"tokens": 64, "micro_batches": 4, "epochs": 2},
     "only 9 optimizer steps, in which hardly anything is learned; fewer micro_batches or fewer tokens a row or more "
     "epochs make more (tokens is 64, epochs 2)"),
    (9, {"max_steps": 9, "epochs": 3},
     "max_steps 9 alone decides how long the run is; epochs 3 is not looked at"),
    (10, {}, None), (1, {"max_steps": 1}, None)])
def test_few_steps_are_said_unless_they_were_asked_for(steps, settings, words):
    assert hints([], Training(**settings), steps, CPU) == ([] if words is None else [words])


@pytest.mark.parametrize(("n_tokens", "n_filler", "share"), [(100, 300, "75%"), (49, 51, "51%"), (50, 50, None)])
def test_rows_that_are_mostly_filler_are_said(n_tokens, n_filler, share):
    found = hints(Rows(n_tokens, n_filler), Training(), 100, torch.device("cuda"))
    assert hints(Rows(n_tokens, n_filler), Training(), 100, CPU) == []      # which leaves filler out
    assert [line.partition(" ")[0] for line in found] == ([] if share is None else [share])
    assert all("fewer tokens a row (tokens is 64)" in line for line in found)


CHANCE = math.log(1000)     # 6.9


@pytest.mark.parametrize(("losses", "at"), [
    ([2.0] * 3 + [9.0] * 30, 6),                                    # 5.5 is above (2 + 6.9)/2
    ([2.0] * 30 + [9.0] * 30, 30 + WINDOW // 2),
    ([2.0 + 0.1 * i for i in range(100)], 36),
    ([2.0] * 10 + [30.0] + [2.0] * 30, None),                       # one that is far off, and no more
    ([2.0, 3.0] * 30, None), ([6.8] * 5 + [7.5] * 50, None), ([7.5] * 40, None), ([0.01] + [3.0] * 50, None)])
def test_a_loss_that_rises_far_above_its_start_is_seen_once(losses, at):
    watch = Divergence(CHANCE)
    seen = [step for step, loss in enumerate(losses, 1) if watch.seen(loss)]
    assert seen == ([] if at is None else [at])


def test_a_loss_is_looked_at_after_a_few_steps_over_a_window_and_only_with_a_measure():
    watch = Divergence(CHANCE)
    assert [watch.seen(loss) for loss in [1.0, *[50.0] * EARLY]] == [False] * (EARLY - 1) + [True, False]
    for _ in range(WINDOW):
        watch.seen(3.0)
    assert watch.median == 3.0 and watch.steps == WINDOW and watch.first == 1.0
    free = Divergence(None)
    assert not any(free.seen(loss) for loss in [1.0, *[50.0] * 40])


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another graph", "times 0"])
def test_a_first_step_without_a_gradient_is_said_once(fakes, elsewhere):
    other = torch.ones((), requires_grad=True)

    def objective(model, batch):
        return (other * batch.n_trained if elsewhere else model.loss_sum(batch)[0] * 0), batch.n_trained

    batches = [fakes.make_batch(12, 7 + i, seed=i) for i in range(6)]
    model, listener = fakes.TinyModel(), Notes()
    before = [model.A.detach().clone(), model.B.detach().clone()]
    run = fit(model, batches, Training(max_steps=3), objective, [listener])
    assert listener.heard == ["start", 1, NO_GRADIENT, 2, 3] and run.end == "finished"
    assert torch.equal(model.A, before[0]) and torch.equal(model.B, before[1])


def test_observers_hear_notes_between_the_start_and_the_step_that_shows_it(fakes):
    listener = Notes()
    batches = [fakes.make_batch(12, 7 + i, seed=i) for i in range(6)]
    run = fit(fakes.TinyModel(), batches, Training(), fakes.objective, [listener])
    assert listener.heard[0] == "start" and "only 6 optimizer steps" in listener.heard[1]
    assert listener.heard[2:] == [1, 2, 3, 4, 5, 6] and run.diverging is None
    listener = Notes()
    training = Training(lr=3.0, clip=0.0, max_steps=12, schedule="constant")
    run = fit(fakes.TinyModel(), batches, training, fakes.objective, [listener], chance=math.log(fakes.VOCAB))
    notes = [each for each in listener.heard if isinstance(each, str) and each != "start"]
    assert len(notes) == 1 and f"step {run.diverging}: diverging: the median loss of the last " in notes[0]
    assert "begin anew, with a lower lr (it is 3)" in notes[0] and run.end == "finished"
    assert listener.heard.index(notes[0]) == listener.heard.index(run.diverging) + 1
    assert f"diverging since step {run.diverging}" in repr(run)
