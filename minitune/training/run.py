"""What a training run tells: its plan, one record a step, the finished run, and the observers that listen."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from minitune.config import Training


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first step. ``n_parameters`` counts the trained elements."""

    total_steps: int
    n_parameters: int
    device: str
    training: Training


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step, in plain numbers. ``step`` counts from 1; ``grad_norm`` is the norm before clipping.

    ``loss`` is the mean over the step's trained tokens (nats), before the update. ``seconds`` run from the end of the
    step before to the end of this one, data included; ``n_tokens`` counts all positions. ``n_filler`` of them are what
    packing left of the rows: work for the device, but no token of the data, so the rates leave them out.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    n_trained: int
    n_tokens: int
    seconds: float
    n_filler: int = 0

    @property
    def tokens_per_second(self) -> float:
        return (self.n_tokens - self.n_filler) / self.seconds if self.seconds > 0 else 0.0


@dataclass(kw_only=True)
class Run:
    """A training run: every step's record and how it ended.

    ``end`` is "finished" when all planned steps were done, "out of data" when the data ended before, "interrupted" when
    Ctrl-C stopped it, "failed" when another exception did. ``adapter`` is where the caller saved the result, if it did.
    """

    info: RunInfo
    records: list[StepRecord] = field(default_factory=list)
    end: Literal["finished", "out of data", "interrupted", "failed"] = "failed"
    adapter: Path | None = None

    @property
    def losses(self) -> list[float]:
        return [r.loss for r in self.records]

    @property
    def final_loss(self) -> float:
        """The last step's loss; NaN when no step was finished."""
        return self.records[-1].loss if self.records else float("nan")

    @property
    def n_tokens(self) -> int:
        return sum(r.n_tokens for r in self.records)

    @property
    def n_filler(self) -> int:
        return sum(r.n_filler for r in self.records)

    @property
    def n_trained(self) -> int:
        return sum(r.n_trained for r in self.records)

    @property
    def seconds(self) -> float:
        """Wall time from before the first batch to the end of the last step."""
        return sum(r.seconds for r in self.records)

    @property
    def tokens_per_second(self) -> float:
        """Overall: all tokens but filler by all seconds, the slow first step included."""
        return (self.n_tokens - self.n_filler) / self.seconds if self.seconds > 0 else 0.0

    @property
    def trained_tokens_per_second(self) -> float:
        """Overall, counting trained tokens only."""
        return self.n_trained / self.seconds if self.seconds > 0 else 0.0

    @property
    def steady_tokens_per_second(self) -> float:
        """The median step's rate, without the first step (it warms caches and compiles kernels) if there are more."""
        rates = [r.tokens_per_second for r in self.records[1:] or self.records]
        return statistics.median(rates) if rates else 0.0


class Observer(Protocol):
    """Listens to a run. All methods are optional; a class that inherits gets those that do nothing."""

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""
        return None

    def on_step(self, record: StepRecord) -> None:
        """After step 1, every ``log_every``-th step and the last one; on a GPU one step later than it happens."""
        return None

    def on_end(self, run: Run) -> None:
        """Once, whatever happened: see ``run.end``."""
        return None
