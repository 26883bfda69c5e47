"""Spikes: how far above the steps before it a step's loss and gradient norm may stand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minitune.training.run import StepRecord

WINDOW = 128
"""As many steps before it are looked at, and as many standard deviations it may stand above their mean (SIGMAS), as in
OLMo-core's SkipStepOptimizer; steps that were left out do not count."""
SIGMAS = 6.0
LEAST = 32
"""Steps before which nothing is a spike: their spread says too little."""
QUIET = 0.05
"""A spread below this share of the mean counts as so much: where a loss hardly moves, a trifle is no spike."""


@dataclass(frozen=True)
class Limits:
    """The highest loss and gradient norm of a step that is no spike."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def hold(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether neither stands above its limit, on the device (0-dim); what is not a number does."""
        return (loss <= self.loss) & (grad_norm <= self.grad_norm)

    def told(self, loss: float, grad_norm: float) -> str:
        """What of a step stands above its limit, and is a number; an empty text where nothing does."""
        both = (("loss", loss, self.loss), ("gradient norm", grad_norm, self.grad_norm))
        above = [f"{name} above {limit:.4g}" for name, value, limit in both if limit < value < math.inf]
        return f"a spike, {' and '.join(above)}" if above else ""


NONE = Limits()


def limits(records: Sequence[StepRecord], seen: int) -> Limits:
    """Those after the first `seen` of the records: the same ones in a run that was resumed."""
    before = (records[place] for place in reversed(range(min(seen, len(records)))))
    last = list(islice((record for record in before if not record.left_out), WINDOW))
    if len(last) < LEAST:
        return NONE
    return Limits(_limit([record.loss for record in last]), _limit([record.grad_norm for record in last]))


def _limit(values: Sequence[float]) -> float:
    """As fp32, in which the device compares."""
    mean = statistics.fmean(values)
    spread = max(statistics.pstdev(values, mean), QUIET * abs(mean))
    return float(torch.tensor(mean + SIGMAS * spread, dtype=torch.float32))
