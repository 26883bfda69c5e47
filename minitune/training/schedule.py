"""learning_rate: the learning rate of each step as a closed formula, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from minitune.config import Training
from minitune.errors import InputError

DEFAULTS = {"slanted-triangular": (0.1, 1 / 32)}
"""(warmup, min_lr_ratio) where the settings leave them open; Howard & Ruder's cut_frac and 1/ratio."""


def warmup_of(training: Training) -> float:
    """`training.warmup`, or its schedule's default."""
    return DEFAULTS.get(training.schedule, (0.03, 0.0))[0] if training.warmup is None else training.warmup


def min_lr_ratio_of(training: Training) -> float:
    """`training.min_lr_ratio`, or its schedule's default."""
    return DEFAULTS.get(training.schedule, (0.03, 0.0))[1] if training.min_lr_ratio is None else training.min_lr_ratio


def warmup_steps(total_steps: int, training: Training) -> int:
    """The warm-up in steps: below 1 it is a share of the run, rounded up; from 1 on a number of steps.

    At most what leaves room for the peak, and for the end where there is a decay.
    """
    steps = _steps(warmup_of(training), total_steps)
    return min(steps, max(0, total_steps - (1 if training.schedule == "constant" else 2)))


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The learning rate of step 0 … total_steps - 1.

    With w warm-up steps: lr · (step + 1) / (w + 1) while step < w, so the first step already moves; lr at step w; then
    it stays (constant), or falls towards lr · min_lr_ratio, which it would reach one step behind the last, so that no
    step is wasted at 0: on a straight line (linear), on half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), or,
    after standing still, on a line over the last part, ``decay`` (warmup-stable-decay, "wsd": Hu et al. 2024,
    arXiv:2404.06395). "slanted-triangular" (Howard & Ruder 2018, arXiv:1801.06146, eq. 3) is a line up from
    lr · min_lr_ratio and one down. A run of one step has lr.
    """
    if total_steps < 1 or not 0 <= step < total_steps:
        raise InputError(f"learning_rate: step is {step} of {total_steps}; steps go from 0 to total_steps - 1")
    peak, low = training.lr, training.lr * min_lr_ratio_of(training)
    warmup, last = warmup_steps(total_steps, training), total_steps - 1
    if step < warmup:
        if training.schedule == "slanted-triangular":
            return low + (peak - low) * step / warmup
        return peak * (step + 1) / (warmup + 1)
    start = warmup if training.schedule != "wsd" else max(warmup, last - _steps(training.decay, total_steps))
    if step <= start or training.schedule == "constant":
        return peak
    progress = (step - start) / (total_steps - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if training.schedule == "cosine" else 1 - progress
    return low + (peak - low) * left


def _steps(amount: float, total_steps: int) -> int:
    """A share of the run (below 1) or a number of steps, in whole steps."""
    return math.ceil(amount * total_steps) if amount < 1 else math.ceil(amount)
