"""What a training run tells: its plan, one record a step and an evaluation, the finished run, and its observers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from minitune.config import Training


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first step. ``n_parameters`` counts the trained elements; ``matrix_rate`` is the FLOP/s
    of a large matrix product, where it was measured.
    """

    total_steps: int
    n_parameters: int
    device: str
    training: Training
    matrix_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step, in plain numbers. ``step`` counts from 1; ``grad_norm`` is the norm before clipping.

    ``loss`` is the mean over the step's trained tokens (nats), of dpo over its pairs, before the update. ``seconds``
    run from the end of the step before to the end of this one, data included and evaluations not; ``n_tokens`` counts
    all positions.
    ``n_filler`` of them are what packing left of the rows: work for the device, but no token of the data, so the rates
    and ``flops`` (training/flops.py; 0 where not known) leave them out. ``memory`` is the peak so far, in bytes:
    tensors on a GPU, else the process. ``left_out``: the step changed no weight, since its loss or the norm is not
    finite, or is a spike that the settings leave out (training/spikes.py).
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    n_trained: int
    n_tokens: int
    seconds: float
    n_filler: int = 0
    flops: float = 0.0
    memory: int = 0
    left_out: bool = False

    @property
    def tokens_per_second(self) -> float:
        """All tokens but filler; 0 where the clock has not moved."""
        return (self.n_tokens - self.n_filler) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """A question and what the model wrote after it."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The model after ``step`` steps (0: before training), seen on the validation data and asked the sample questions.

    ``loss`` (nats), ``perplexity``, ``accuracy`` and ``n_tokens`` are those of the validation data's trained tokens,
    None without such data; of pairs (dpo) the loss is its mean over them, the accuracy the share whose chosen answer is
    ahead, ``chosen`` and ``rejected`` are the mean gains of both on the base (nats), and there is no perplexity.
    ``answers`` is empty where nothing was asked. ``seconds`` counts both.
    """

    step: int
    seconds: float
    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    n_tokens: int | None = None
    chosen: float | None = None
    rejected: float | None = None
    answers: tuple[SampleAnswer, ...] = ()


@dataclass(kw_only=True)
class Run:
    """A training run: every step's record, every evaluation's, and how it ended.

    ``end`` is "finished" when all planned steps were done, "stopped early" when the validation loss fell no more
    (``patience``), "out of data" when the data ended before, "interrupted" when Ctrl-C stopped it, "diverged" when its
    numbers stayed no longer finite, or by spikes, "failed" when another exception did.
    ``adapter`` is the folder of what was trained, if it was saved; ``best_adapter`` that of the lowest validation loss.
    ``diverging``: the step after which the loss stood far above where it began (training/hints.py), though finite.
    ``checkpoint``: the step after which an interrupted run goes on when it is resumed; ``restored``: where it diverged,
    the step whose weights the last checkpoint has put back into the model; None where there is no checkpoint.
    A run that was resumed has the records and evaluations of all its steps, those before the interruption too.
    """

    info: RunInfo
    records: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    end: Literal["finished", "stopped early", "out of data", "interrupted", "diverged", "failed"] = "failed"
    adapter: Path | None = None
    best_adapter: Path | None = None
    diverging: int | None = None
    checkpoint: int | None = None
    restored: int | None = None

    def __repr__(self) -> str:
        """One line; the records are in ``records``."""
        how = self.end if self.diverging is None else f"{self.end}, diverging since step {self.diverging}"
        parts = [f"{how}, {len(self.records):,} of {self.info.total_steps:,} steps",
                 f"{self.n_tokens - self.n_filler:,} tokens ({self.n_trained:,} trained)",
                 f"final loss {self.final_loss:.4f}", f"{self.tokens_per_second:,.0f} tokens/s"]
        if self.best is not None:
            parts.append(f"best validation loss {self.best.loss:.4f} after step {self.best.step}")
        places = [str(place) for place in (self.adapter, self.best_adapter) if place is not None]
        return f"Run({', '.join(parts)}{'; saved in ' if places else ''}{' and '.join(places)})"

    @property
    def done(self) -> bool:
        """Whether it came to its end, and is not to be resumed."""
        return self.end in ("finished", "stopped early", "out of data")

    @property
    def skipped(self) -> int:
        """Steps that were left out."""
        return sum(r.left_out for r in self.records)

    @property
    def losses(self) -> list[float]:
        """Of each step, before its update."""
        return [r.loss for r in self.records]

    @property
    def final_loss(self) -> float:
        """The last step's loss; NaN when no step was finished."""
        return self.records[-1].loss if self.records else float("nan")

    @property
    def best(self) -> EvaluationRecord | None:
        """The evaluation after step 1 or later with the lowest validation loss, the first of those that are equal."""
        found = [(e.loss, e.step, e) for e in self.evaluations if e.step and e.loss is not None]
        return min((f for f in found if math.isfinite(f[0])), key=lambda f: f[:2], default=(0, 0, None))[2]

    @property
    def n_tokens(self) -> int:
        """All positions of all steps, filler among them."""
        return sum(r.n_tokens for r in self.records)

    @property
    def n_filler(self) -> int:
        """Those that packing left of the rows."""
        return sum(r.n_filler for r in self.records)

    @property
    def n_trained(self) -> int:
        """Trained tokens of all steps."""
        return sum(r.n_trained for r in self.records)

    @property
    def seconds(self) -> float:
        """Wall time from before the first batch to the end of the last step, evaluations left out."""
        return sum(r.seconds for r in self.records)

    @property
    def tokens_per_second(self) -> float:
        """Overall: all tokens but filler by all seconds, the slow first step included."""
        return (self.n_tokens - self.n_filler) / self.seconds if self.seconds > 0 else 0.0

    @property
    def steady_tokens_per_second(self) -> float:
        """The median step's rate, without the first step (it warms caches and compiles kernels) if there are more."""
        rates = [r.tokens_per_second for r in self.records[1:] or self.records]
        return statistics.median(rates) if rates else 0.0


class Observer(Protocol):
    """Listens to a run. All methods are optional; a class that inherits gets those that do nothing."""

    def on_ledger(self, ledgers: Mapping[str, Any]) -> None:
        """Before the run, where the data keeps them: the ledgers (minitune/data/ledger.py) of "train" and "valid"."""
        return None

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""
        return None

    def on_resume(self, run: Run) -> None:
        """In place of `on_start` where an interrupted run goes on: ``run`` has the records and evaluations of the steps
        that are done. An observer without this method is told of the start instead, as a class that inherits is."""
        self.on_start(run.info)

    def on_note(self, text: str) -> None:
        """What a user should know of the run and no number says, in a sentence: before the first step, and during the
        run of steps left out, spikes, a loss that diverges, memory or a checkpoint that failed, a crowded machine."""
        return None

    def on_step(self, record: StepRecord) -> None:
        """After step 1, every ``log_every``-th step and the last one; on a GPU one step later than it happens."""
        return None

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Before the first step, every ``evaluate_every`` steps and after the last one, where there is validation data
        or a question: all steps up to it are done and told, and the model stands still."""
        return None

    def on_end(self, run: Run) -> None:
        """Once, whatever happened: see ``run.end``."""
        return None


def tell_begin(observers: Sequence[Observer], run: Run) -> None:
    """Tell of the start, or of going on where steps are done already."""
    for observer in observers:
        resumes = bool(run.records) and hasattr(observer, "on_resume")
        tell([observer], "on_resume" if resumes else "on_start", run if resumes else run.info)


def tell(observers: Sequence[Observer], method: str, what: object) -> None:
    """Call that method of every observer that has it."""
    for observer in observers:
        listener = getattr(observer, method, None)
        if listener is not None:
            listener(what)
