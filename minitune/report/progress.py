"""Progress of a run: a rich bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from minitune.training.run import Observer, Run, RunInfo, StepRecord

PLAIN_LINES = 20
"""About so many lines a whole run prints where there is no terminal."""


def progress(stream: TextIO | None = None) -> Observer:
    """The observer that suits `stream` (stderr): a bar if it is a terminal and rich is installed, else plain lines."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        try:
            return ProgressBar(stream)
        except ImportError:
            return ProgressLines(stream)
    return ProgressLines(stream)


class ProgressLines(Observer):
    """One line for the first, the last and about every twentieth part of the steps."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._info: RunInfo | None = None
        self._started = 0.0
        self._next = 0.0

    def on_start(self, info: RunInfo) -> None:
        self._info, self._started, self._next = info, time.perf_counter(), 0.0
        self._print(f"training {info.n_parameters:,} parameters on {info.device}, {info.total_steps} steps")

    def on_step(self, record: StepRecord) -> None:
        total = self._info.total_steps if self._info else record.step
        if record.step >= self._next or record.step == total:     # log_every may leave steps out
            self._next = (record.step * PLAIN_LINES // total + 1) * total / PLAIN_LINES
            elapsed = time.perf_counter() - self._started
            left = elapsed / record.step * (total - record.step)
            self._print(f"step {record.step:>{len(str(total))}}/{total}  {numbers(record)}  left {clock(left)}")

    def on_end(self, run: Run) -> None:
        self._print(summary(run))

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class ProgressBar(Observer):
    """A bar with loss, learning rate, tokens/s and the time left. Raises ImportError where rich is missing."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=stream)
        self._bar: Any = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(),
                                  TextColumn("{task.description}"), TextColumn("left"), TimeRemainingColumn(),
                                  console=self.console)
        self._task: Any = None

    def on_start(self, info: RunInfo) -> None:
        self.console.print(f"training {info.n_parameters:,} parameters on {info.device}", highlight=False)
        self._task = self._bar.add_task("", total=info.total_steps)
        self._bar.start()

    def on_step(self, record: StepRecord) -> None:
        self._bar.update(self._task, completed=record.step, description=numbers(record))

    def on_end(self, run: Run) -> None:
        self._bar.stop()
        self.console.print(summary(run), highlight=False, markup=False)


def numbers(record: StepRecord) -> str:
    """A step's figures in one fixed-width line."""
    return f"loss {record.loss:7.4f}  lr {record.lr:.2e}  {record.tokens_per_second:8,.0f} tokens/s"


def summary(run: Run) -> str:
    """The run in one line, with both rates: overall, and the median step without the first. How full the rows were is
    told because the device works for the filler, too, which the rates leave out."""
    n_steps = f"{len(run.records)} step{'' if len(run.records) == 1 else 's'}"
    done = run.end in ("finished", "out of data")
    end = f"{run.end}: {n_steps}" if done else f"{run.end} after {n_steps}, what was trained is not saved"
    n_real = run.n_tokens - run.n_filler
    full = f", rows {n_real / run.n_tokens:.0%} full" if run.n_tokens else ""
    return (f"{end}; {n_real:,} tokens ({run.n_trained:,} trained{full}) in "
            f"{clock(run.seconds)}; {run.tokens_per_second:,.0f} tokens/s overall, "
            f"{run.steady_tokens_per_second:,.0f} steady; final loss {run.final_loss:.4f}")


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:02:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
