"""fit: plans, trains, tells its observers in order, ends honestly, and stops at numbers that are none."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from minitune.config import Training
from minitune.data.packing import pack
from minitune.errors import InputError
from minitune.training import runner
from minitune.training.loop import fit
from minitune.training.run import Observer, Run, RunInfo, StepRecord
from minitune.training.schedule import learning_rate


class Listener(Observer):
    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_start(self, info):
        self.heard.append(info)

    def on_step(self, record):
        self.heard.append(record.step)

    def on_end(self, run):
        self.heard.append(run)


def data(fakes, n=6):
    return [fakes.make_batch(12, 7 + i, seed=i) for i in range(n)]


def test_a_run_learns_and_records_every_step(fakes):
    model, training = fakes.TinyModel(), Training(lr=0.05, epochs=20, micro_batches=2, schedule="linear")
    frozen = model.table.clone()
    model.eval()
    run = fit(model, data(fakes), training, fakes.objective)
    assert run.end == "finished" and len(run.records) == run.info.total_steps == 60
    assert run.records[0].loss == pytest.approx(math.log(fakes.VOCAB), rel=1e-5)
    assert run.final_loss == run.losses[-1] < 0.3
    assert [r.step for r in run.records] == list(range(1, 61))
    assert [r.lr for r in run.records] == [learning_rate(i, 60, training) for i in range(60)]
    assert all(r.seconds > 0 and r.grad_norm > 0 for r in run.records)
    batches = data(fakes)
    assert run.n_tokens == 20 * sum(b.n_tokens for b in batches)
    assert run.n_trained == 20 * sum(b.n_trained for b in batches)
    assert run.info.n_parameters == model.A.numel() + model.B.numel()
    assert all(model.modes) and not model.training
    assert torch.equal(model.table, frozen)


def test_moments_of_8_bits_follow_those_of_32(fakes):
    losses = {moments: fit(fakes.TinyModel(), data(fakes), Training(lr=0.05, epochs=20, moments=moments),
                           fakes.objective).losses for moments in ("fp32", "8bit")}
    assert losses["8bit"] != losses["fp32"] and losses["8bit"][-1] == pytest.approx(losses["fp32"][-1], rel=0.1)
    with pytest.raises(InputError, match="which only adamw has"):
        Training(optimizer="sgd", moments="8bit")


def test_label_smoothing_is_a_share():
    with pytest.raises(InputError, match=r"label_smoothing is 1\.0; it must be below 1"):
        Training(label_smoothing=1.0)


def test_runs_are_bitwise_repeatable(fakes):
    losses = [fit(fakes.TinyModel(), data(fakes), Training(epochs=3), fakes.objective).losses for _ in range(2)]
    assert losses[0] == losses[1]


def test_what_is_drawn_in_a_run_is_drawn_from_its_seed(fakes):
    """Dropout, that is; whatever was drawn before."""
    def drawing(model, batch):
        drawn.append(torch.rand(()).item())
        return fakes.objective(model, batch)

    runs = []
    for seed in (3, 3, 4):
        drawn = []
        fit(fakes.TinyModel(), data(fakes), Training(max_steps=3, seed=seed), drawing)
        runs.append(drawn)
    assert runs[0] == runs[1] != runs[2]


def test_each_step_has_its_own_flops(fakes):
    costs = SimpleNamespace(of_batch=lambda batch: float(batch.n_tokens))
    run = fit(fakes.TinyModel(), data(fakes), Training(max_steps=4, micro_batches=2), fakes.objective, costs=costs)
    assert [record.flops for record in run.records] == [record.n_tokens for record in run.records]


def test_a_cpu_leaves_filler_out(fakes):
    seen = []

    def watching(model, batch):
        seen.append(batch.n_tokens)
        return fakes.objective(model, batch)

    batches = pack([[1, 2, 3, 4, 5]], tokens=200)
    run = fit(fakes.TinyModel(), batches, Training(max_steps=1), watching)
    assert seen[0] < 200 and run.records[0].n_tokens == 200 and run.records[0].n_filler == 195


@pytest.mark.parametrize("lag", [0, 1])
def test_observers_hear_start_steps_and_end_in_order(fakes, monkeypatch, lag):
    if lag:  # as on a GPU
        real = runner.deque
        monkeypatch.setattr(runner, "deque", lambda: Lagging(real))
    listener, bare = Listener(), object()
    run = fit(fakes.TinyModel(), data(fakes), Training(max_steps=10, log_every=4), fakes.objective, [listener, bare])
    assert listener.heard == [run.info, 1, 4, 8, 10, run]
    assert [r.step for r in run.records] == list(range(1, 11))


class Lagging:
    """A queue that seems one shorter than it is until it is drained: steps are settled one late."""

    def __init__(self, real) -> None:
        self.items, self.draining = real(), False

    def append(self, item) -> None:
        self.items.append(item)

    def popleft(self):
        return self.items.popleft()

    def __len__(self) -> int:
        return len(self.items) - 1

    def __bool__(self) -> bool:
        return bool(self.items)


@pytest.mark.parametrize(("settings", "steps"), [
    ({}, 6), ({"micro_batches": 4}, 2), ({"epochs": 2}, 12), ({"epochs": 2, "micro_batches": 5}, 3),
    ({"max_steps": 2}, 2), ({"max_steps": 8, "micro_batches": 2}, 8),
])
def test_number_of_steps(fakes, settings, steps):
    run = fit(fakes.TinyModel(), data(fakes), Training(**settings), fakes.objective)
    assert len(run.records) == run.info.total_steps == steps and run.end == "finished"


def test_the_last_step_takes_what_is_left(fakes):
    batches = data(fakes, 3)
    run = fit(fakes.TinyModel(), batches, Training(micro_batches=2), fakes.objective)
    assert [r.n_tokens for r in run.records] == [batches[0].n_tokens + batches[1].n_tokens, batches[2].n_tokens]


def test_an_iterator_ends_the_run_when_it_ends(fakes):
    listener = Listener()
    run = fit(fakes.TinyModel(), iter(data(fakes)), Training(max_steps=100, log_every=5), fakes.objective, [listener])
    assert run.end == "out of data" and len(run.records) == 6
    assert listener.heard[1:-1] == [1, 5, 6]
    with pytest.raises(InputError, match="set max_steps"):
        fit(fakes.TinyModel(), iter(data(fakes)), Training(), fakes.objective)


def test_each_epoch_is_drawn_in_its_own_order(fakes):
    class Shuffled:
        drawn: ClassVar[list[int]] = []

        def count(self, epochs):
            return 3 * epochs

        def epoch(self, epoch):
            self.drawn.append(epoch)
            batches = data(fakes, 3)
            return iter(batches[epoch % 3:] + batches[:epoch % 3])

        def __iter__(self):
            raise AssertionError("the epochs' own order is not used")

    run = fit(fakes.TinyModel(), Shuffled(), Training(epochs=3), fakes.objective)
    assert Shuffled.drawn == [0, 1, 2]
    assert [r.n_tokens for r in run.records] == [19, 20, 21, 20, 21, 19, 21, 19, 20]


def test_data_without_trained_tokens(fakes):
    filler = fakes.make_batch(12, trained=False)
    batches = [filler, *data(fakes, 2), filler]
    run = fit(fakes.TinyModel(), batches, Training(), fakes.objective)
    assert [r.n_tokens for r in run.records] == [19, 20] and run.end == "finished" and run.info.total_steps == 2
    assert run.records[-1].lr == fit(fakes.TinyModel(), batches[1:3], Training(), fakes.objective).records[-1].lr
    for empty in ([filler] * 3, []):
        with pytest.raises(InputError, match="no trained token"):
            fit(fakes.TinyModel(), empty, Training(), fakes.objective)


def test_learning_rates_of_groups_keep_their_ratio(fakes):
    equal, plus = fakes.TinyModel(), fakes.TinyModel(lr_ratio=4.0)
    training = Training(max_steps=1, optimizer="sgd", momentum=0.0, lr=0.1, clip=0.0)
    for model in (equal, plus):
        fit(model, data(fakes), training, fakes.objective)
    torch.testing.assert_close(plus.B.detach(), 4 * equal.B.detach())
    assert torch.equal(plus.A, equal.A)


def test_an_interruption_is_told_as_one(fakes):
    class Impatient(Listener):
        def on_step(self, record):
            super().on_step(record)
            if record.step == 3:
                raise KeyboardInterrupt

    listener, model = Impatient(), fakes.TinyModel()
    model.eval()
    with pytest.raises(KeyboardInterrupt):
        fit(model, data(fakes), Training(), fakes.objective, [listener])
    run = listener.heard[-1]
    assert run.end == "interrupted" and len(run.records) == 3 and not model.training


def test_filler_is_counted_and_no_part_of_the_rates(fakes):
    rows = pack([[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3, 4]], tokens=8)
    assert [row.documents.lengths for row in rows] == [(6, 2), (4, 3, 1)]
    full = fakes.make_batch(5, 3)
    run = fit(fakes.TinyModel(), [*rows, full], Training(micro_batches=2, epochs=2), fakes.objective)
    assert [(r.n_tokens, r.n_filler) for r in run.records] == [(16, 3), (16, 2), (16, 1)]
    assert run.n_filler == 6 and run.tokens_per_second == pytest.approx(42 / run.seconds)
    assert [r.tokens_per_second for r in run.records] == pytest.approx([n / r.seconds for n, r in
                                                                        zip((13, 14, 15), run.records, strict=True)])


def test_nothing_to_train_is_said_clearly(fakes):
    model = fakes.TinyModel()
    model.param_groups = lambda lr: []
    with pytest.raises(InputError, match="nothing is trained"):
        fit(model, data(fakes), Training(), fakes.objective)


def test_rates_of_a_run():
    def record(step, seconds):
        return StepRecord(step=step, loss=1.0, lr=0.1, grad_norm=1.0, n_trained=40, n_tokens=100, seconds=seconds)

    info = RunInfo(total_steps=4, n_parameters=1, device="cpu", training=Training())
    run = Run(info=info, records=[record(1, 10.0), record(2, 1.0), record(3, 2.0), record(4, 4.0)])
    assert run.tokens_per_second == pytest.approx(400 / 17)
    assert run.steady_tokens_per_second == 50
    assert Run(info=info, records=[record(1, 10.0)]).steady_tokens_per_second == 10
    assert Run(info=info).tokens_per_second == 0 and math.isnan(Run(info=info).final_loss)


def test_data_that_has_a_length_alone_is_not_begun_again_for_what_trains_nothing(fakes):
    class Loader:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter(self.batches)

    batches = data(fakes, 2)
    run = fit(fakes.TinyModel(), Loader([batches[0], fakes.make_batch(12, trained=False), batches[1]]), Training(),
              fakes.objective)
    assert [r.n_tokens for r in run.records] == [b.n_tokens for b in batches] and run.end == "out of data"
