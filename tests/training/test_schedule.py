"""learning_rate: closed forms, exact ends, warm-up as a share and as a number."""

from __future__ import annotations

import math

import pytest

from minitune.config import Training
from minitune.errors import InputError
from minitune.training.schedule import learning_rate, warmup_steps


def curve(total: int, **settings) -> list[float]:
    training = Training(lr=2.0, **settings)
    return [learning_rate(step, total, training) for step in range(total)]


def test_constant_after_warmup():
    assert curve(6, schedule="constant", warmup=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert curve(3, schedule="constant", warmup=0) == [2.0] * 3


def test_linear_is_a_straight_line_to_the_minimum():
    assert curve(5, schedule="linear", warmup=0, min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
    assert curve(6, schedule="linear", warmup=1) == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(("warmup", "low"), [(0, 0.0), (7, 0.1), (0.05, 0.25)])
def test_cosine_closed_form(warmup, low):
    total = 101
    w = 6 if warmup == 0.05 else warmup
    for step, lr in enumerate(curve(total, schedule="cosine", warmup=warmup, min_lr_ratio=low)):
        decayed = 2 * (low + (1 - low) * (1 + math.cos(math.pi * (step - w) / (total - 1 - w))) / 2)
        assert lr == pytest.approx(2 * (step + 1) / (w + 1) if step < w else decayed, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.99, 1, 5, 5000])
def test_ends_are_exact(schedule, total, warmup):
    rates = curve(total, schedule=schedule, warmup=warmup, min_lr_ratio=0.125)
    assert rates[0] > 0
    assert max(rates) == 2.0
    assert rates[-1] == (0.25 if schedule != "constant" and total > 1 else 2.0)
    peak = rates.index(2.0)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_warmup_below_one_is_a_share():
    assert warmup_steps(200, Training(warmup=0.03)) == 6
    assert warmup_steps(10, Training(warmup=0.03)) == 1
    assert warmup_steps(200, Training(warmup=1)) == 1
    assert warmup_steps(200, Training(warmup=50)) == 50


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (5, 5), (0, 0)])
def test_refuses_steps_outside_the_run(step, total):
    with pytest.raises(InputError, match=f"step is {step} of {total}"):
        learning_rate(step, total, Training())
