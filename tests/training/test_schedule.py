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
    assert curve(4, schedule="linear", warmup=0, min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert curve(5, schedule="linear", warmup=1) == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize(("warmup", "low"), [(0, 0.0), (7, 0.1), (0.05, 0.25)])
def test_cosine_closed_form(warmup, low):
    total = 101
    w = 6 if warmup == 0.05 else warmup
    for step, lr in enumerate(curve(total, schedule="cosine", warmup=warmup, min_lr_ratio=low)):
        decayed = 2 * (low + (1 - low) * (1 + math.cos(math.pi * (step - w) / (total - w))) / 2)
        assert lr == pytest.approx(2 * (step + 1) / (w + 1) if step < w else decayed, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "slanted-triangular"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.99, 1, 5, 5000])
def test_ends_are_exact(schedule, total, warmup):
    rates = curve(total, schedule=schedule, warmup=warmup, min_lr_ratio=0.125)
    assert rates[0] > 0
    assert max(rates) == 2.0
    if schedule != "constant" and total > 1:
        assert 0.25 < rates[-1] < 2.0       # one step more would be there
    else:
        assert rates[-1] == 2.0
    peak = rates.index(2.0)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_wsd_stands_still_and_falls_at_the_end():
    assert curve(8, schedule="wsd", warmup=2, decay=3) == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 1.5, 1, 0.5])
    rates = curve(1000, schedule="wsd", warmup=0.05, decay=0.2, min_lr_ratio=0.1)
    assert rates[50:800] == [2.0] * 750 and rates[800] < 2 and rates[-1] == pytest.approx(0.2 + 1.8 / 201)
    assert curve(1000, schedule="wsd")[:900] == [2 * (i + 1) / 31 for i in range(30)] + [2.0] * 870     # the defaults
    late = curve(10, schedule="wsd", warmup=5, decay=9)
    assert late[5:] == curve(10, schedule="linear", warmup=5)[5:]


@pytest.mark.parametrize("total", [100, 1000])
def test_slanted_triangular_is_that_of_the_paper(total):
    """Howard & Ruder 2018, eq. 3, with its cut_frac and ratio."""
    cut_frac, ratio = 0.1, 32
    cut = math.floor(total * cut_frac)
    for t, lr in enumerate(curve(total, schedule="slanted-triangular")):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert lr == pytest.approx(2 * (1 + p * (ratio - 1)) / ratio, abs=1e-12)
    assert curve(total, schedule="slanted-triangular")[:cut + 1] == pytest.approx(
        [2 * (1 + t / cut * (ratio - 1)) / ratio for t in range(cut + 1)])
    assert curve(4, schedule="slanted-triangular", warmup=2, min_lr_ratio=0.5) == pytest.approx([1, 1.5, 2, 1.5])


def test_warmup_below_one_is_a_share():
    assert warmup_steps(200, Training(warmup=0.03)) == 6
    assert warmup_steps(10, Training(warmup=0.03)) == 1
    assert warmup_steps(200, Training(warmup=1)) == 1
    assert warmup_steps(200, Training(warmup=50)) == 50


@pytest.mark.parametrize(("settings", "message"), [
    ({"min_lr_ratio": 1.5}, r"min_lr_ratio is 1\.5; it must be at most 1"),
    ({"schedule": "slanted-triangular", "min_lr_ratio": 0.0}, "min_lr_ratio is 0; slanted-triangular starts at"),
    ({"schedule": "wsd", "decay": 0.0}, r"decay is 0\.0; it must be a positive"),
    ({"warmup": float("nan")}, "warmup is nan"), ({"momentum": 2.0}, r"momentum is 2\.0; it must be below 1"),
    ({"lr": 0.1, "weight_decay": 10.0}, r"lr · weight_decay is 1; at 1 or more"),
    ({"evaluate_every": 0}, "evaluate_every is 0; it must be a whole number of at least 1")])
def test_settings_that_make_no_schedule_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Training(**settings)


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (5, 5), (0, 0)])
def test_refuses_steps_outside_the_run(step, total):
    with pytest.raises(InputError, match=f"step is {step} of {total}"):
        learning_rate(step, total, Training())
