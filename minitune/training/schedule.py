"""learning_rate: the learning rate of each step as a closed formula, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from minitune.config import Training
from minitune.errors import InputError


def warmup_steps(total_steps: int, training: Training) -> int:
    """`training.warmup` as steps: below 1 it is a share of the run, rounded up; from 1 on a number of steps.

    At most what leaves room for the peak, and for the end where there is a decay.
    """
    share = training.warmup < 1
    steps = math.ceil(training.warmup * total_steps) if share else math.ceil(training.warmup)
    return min(steps, max(0, total_steps - (1 if training.schedule == "constant" else 2)))


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The learning rate of step 0 … total_steps - 1.

    With w warm-up steps: lr · (step + 1) / (w + 1) while step < w, so the first step already moves; lr at step w; then
    constant, or a straight line, or half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983) that reaches
    lr · min_lr_ratio exactly at the last step. A run of one step has lr.
    """
    if total_steps < 1 or not 0 <= step < total_steps:
        raise InputError(f"learning_rate: step is {step} of {total_steps}; steps go from 0 to total_steps - 1")
    peak, low = training.lr, training.lr * training.min_lr_ratio
    warmup = warmup_steps(total_steps, training)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step == warmup or training.schedule == "constant":
        return peak
    if step == total_steps - 1:
        return low
    progress = (step - warmup) / (total_steps - 1 - warmup)
    left = 1 - progress if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return low + (peak - low) * left
