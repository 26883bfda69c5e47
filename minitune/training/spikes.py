"""Spikes: how far above the steps before it a step's loss and gradient norm may stand."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.training.run import StepRecord

WINDOW = 128
"""As many steps before it are looked at, and as many standard deviations it may stand above their mean (SIGMAS), as in
OLMo-core's SkipStepOptimizer. There a spike counts in full, and one that is high enough hides all that follow for a
whole window; here it counts as the limit that it was above: one alone hides nothing, and steps of a higher kind that
keep coming raise the limit, by more and more."""
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
        """What of a step stands above its limit; an empty text where nothing does, or it is not a number."""
        both = (("loss", loss, self.loss), ("gradient norm", grad_norm, self.grad_norm))
        above = [f"{name} above {limit:.4g}" for name, value, limit in both
                 if value > limit and math.isfinite(loss) and math.isfinite(grad_norm)]
        return f"a spike, {' and '.join(above)}" if above else ""


NONE = Limits()


class Window:
    """The last steps of a run that were numbers, as they count."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._seen = 0

    def limits(self, records: Sequence[StepRecord], seen: int) -> Limits:
        """Those after the first `seen` of the run's records, never fewer than before: the same ones in a run that was
        resumed."""
        for record in records[self._seen:max(seen, 0)]:
            self._seen += 1
            if is_number(record):
                highest = self._limits()
                self._losses.append(min(record.loss, highest.loss))
                self._norms.append(min(record.grad_norm, highest.grad_norm))
        return self._limits()

    def _limits(self) -> Limits:
        return NONE if len(self._losses) < LEAST else Limits(_limit(self._losses), _limit(self._norms))


def is_number(record: StepRecord) -> bool:
    """Whether a step's loss and gradient were finite."""
    return math.isfinite(record.loss) and math.isfinite(record.grad_norm)


def _limit(values: Sequence[float]) -> float:
    """As fp32, in which the device compares."""
    mean = statistics.fmean(values)
    spread = max(statistics.pstdev(values, mean), QUIET * abs(mean))
    return float(torch.tensor(mean + SIGMAS * spread, dtype=torch.float32))
