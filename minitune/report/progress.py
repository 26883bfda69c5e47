"""Progress of a run: a rich bar on a terminal, a line that renews itself in a notebook, plain lines anywhere else.

`reading` is that of a file that is being encoded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, cast

from minitune.report.ledger import print_ledgers
from minitune.report.terminal import WhileItTakes, say
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord

PLAIN_LINES = 20
"""About so many lines a whole run prints where there is no terminal."""
RENEWED = 0.25
"""Seconds between two versions of a notebook's line."""
FIRST, LAST = 2.0, 30.0
"""Seconds before the first line about a file that is read, and the most between two."""


def progress(stream: TextIO | None = None) -> Observer:
    """The observer that suits `stream` (stderr): a bar if it is a terminal and rich is installed, else plain lines; a
    line in the cell's output where this is a notebook and no stream is given."""
    if stream is None and in_notebook():
        return ProgressCell()
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        try:
            return ProgressBar(stream)
        except ImportError:
            return ProgressLines(stream)
    return ProgressLines(stream)


def is_watched() -> bool:
    """Whether somebody looks on: stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. IPython is not imported for it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return hasattr(shell, "kernel")


class ProgressLines(Observer):
    """One line for the first, the last and about every twentieth part of the steps, and one for each evaluation."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = cast(TextIO, WhileItTakes(stream))
        self._info: RunInfo | None = None
        self._started = 0.0
        self._done = 0      # steps of an earlier process
        self._next = 0.0

    def on_ledger(self, ledgers: Mapping[str, Any]) -> None:
        print_ledgers(ledgers, self.stream)

    def on_start(self, info: RunInfo) -> None:
        self._info, self._started, self._next = info, time.perf_counter(), 0.0
        self._print(opening(info))

    def on_resume(self, run: Run) -> None:
        self.on_start(run.info)
        self._done = len(run.records)
        self._print(resuming(run))

    def on_note(self, text: str) -> None:
        self._print(f"note: {text}")

    def on_step(self, record: StepRecord) -> None:
        total = self._info.total_steps if self._info else record.step
        if record.step >= self._next or record.step == total:     # log_every may leave steps out
            self._next = (record.step * PLAIN_LINES // total + 1) * total / PLAIN_LINES
            self._print(self._line(record))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if record.loss is not None:
            self._print(evaluation(record))

    def on_end(self, run: Run) -> None:
        if _began(run):
            self._print(summary(run))

    def _line(self, record: StepRecord) -> str:
        total = self._info.total_steps if self._info else record.step
        left = (time.perf_counter() - self._started) / (record.step - self._done) * (total - record.step)
        rate = self._info.matrix_rate if self._info else None
        return f"step {record.step:>{len(str(total))}}/{total}  {numbers(record, rate)}  left {clock(left)}"

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class ProgressCell(ProgressLines):
    """Under a notebook's cell: one line for the steps, which renews itself; the others stay."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._handle: Any = None
        self._renewed = 0.0

    def on_step(self, record: StepRecord) -> None:
        from IPython.display import display

        now = time.perf_counter()
        if self._handle is None:
            self._handle = display({"text/plain": self._line(record)}, raw=True, display_id=True)
        elif now - self._renewed >= RENEWED or (self._info and record.step == self._info.total_steps):
            self._handle.update({"text/plain": self._line(record)}, raw=True)
        else:
            return
        self._renewed = now


class ProgressBar(Observer):
    """A bar with loss, tokens/s, share of the matrix rate, memory and the time left. Raises ImportError where rich is
    missing."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.stream = cast(TextIO, WhileItTakes(stream))
        self.console = Console(file=self.stream)
        self._bar: Any = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None),
                                  TextColumn("{task.description}"), TextColumn("left"), TimeRemainingColumn(),
                                  console=self.console, expand=True)
        self._task: Any = None
        self._rate: float | None = None

    def on_ledger(self, ledgers: Mapping[str, Any]) -> None:
        print_ledgers(ledgers, self.stream)

    def on_start(self, info: RunInfo) -> None:
        self._rate = info.matrix_rate
        self.console.print(opening(info), highlight=False, markup=False)
        self._task = self._bar.add_task("", total=info.total_steps)
        self._bar.start()

    def on_resume(self, run: Run) -> None:
        self.on_start(run.info)
        self._bar.reset(self._task, completed=len(run.records))
        self.console.print(resuming(run), highlight=False, markup=False)

    def on_note(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, markup=False)

    def on_step(self, record: StepRecord) -> None:
        self._bar.update(self._task, completed=record.step, description=numbers(record, self._rate))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if record.loss is not None:
            self.console.print(evaluation(record), highlight=False, markup=False)

    def on_end(self, run: Run) -> None:
        self._bar.stop()
        if _began(run):
            self.console.print(summary(run), highlight=False, markup=False)


def _began(run: Run) -> bool:
    """Whether there is something to sum up. Of a run that failed before its first step the error says all."""
    return bool(run.records) or run.end != "failed"


def opening(info: RunInfo) -> str:
    """What is about to begin, in one line."""
    rate = f"; matrix products here: {info.matrix_rate / 1e12:,.2f} TFLOP/s" if info.matrix_rate else ""
    steps = f"{info.total_steps} step{'' if info.total_steps == 1 else 's'}"
    return f"training {info.n_parameters:,} parameters on {info.device}, {steps}{rate}"


def resuming(run: Run) -> str:
    """Where a run goes on, in one line."""
    return f"resumed after step {len(run.records)} of {run.info.total_steps}"


def numbers(record: StepRecord, matrix_rate: float | None = None) -> str:
    """A step's figures in one line of fixed width. The share is that of `matrix_rate` (FLOP/s)."""
    share, memory = "", ""
    if matrix_rate and record.flops and record.seconds > 0:
        share = f"  {record.flops / record.seconds / matrix_rate:4.0%} of matrix rate"
    if record.memory:
        memory = f"  {record.memory / 1e9:.1f} GB"
    return f"loss {record.loss:7.4f}  {record.tokens_per_second:8,.0f} tokens/s{share}{memory}"


def evaluation(record: EvaluationRecord) -> str:
    """An evaluation's figures in one line."""
    when = f"after step {record.step}" if record.step else "before training"
    if record.chosen is not None:
        return (f"{when}: validation loss {record.loss:.4f}, chosen answer ahead in {record.accuracy:.1%} of the pairs "
                f"(chosen {record.chosen:+.2f} nats over the base, rejected {record.rejected:+.2f})")
    return (f"{when}: validation loss {record.loss:.4f}, perplexity {record.perplexity:,.2f}, token accuracy "
            f"{record.accuracy:.1%}")


def summary(run: Run) -> str:
    """The run in one line, with both rates: overall, and the median step without the first. How full the rows were is
    told because the device works for the filler, too, which the rates leave out."""
    if not run.records:
        return f"{run.end} before the first step; nothing is kept"
    n_steps = f"{len(run.records)} step{'' if len(run.records) == 1 else 's'}"
    kept = f"what was trained is saved in {run.adapter}" if run.adapter else "what was trained is not saved"
    kept += "" if run.checkpoint is None else f", it can be resumed after step {run.checkpoint}"
    end = f"{run.end}: {n_steps}" if run.done else f"{run.end} after {n_steps}, {kept}"
    n_real = run.n_tokens - run.n_filler
    full = f", rows {n_real / run.n_tokens:.0%} full" if run.n_tokens else ""
    best = f"; best validation loss {run.best.loss:.4f} after step {run.best.step}" if run.best else ""
    left = f"; {run.skipped} step{'' if run.skipped == 1 else 's'} left out" if run.skipped else ""
    risen = "" if run.diverging is None else f"; diverging since step {run.diverging}, begin anew with a lower lr"
    return (f"{end}; {n_real:,} tokens ({run.n_trained:,} trained{full}) in "
            f"{clock(run.seconds)}; {run.tokens_per_second:,.0f} tokens/s overall, "
            f"{run.steady_tokens_per_second:,.0f} steady; final loss {run.final_loss:.4f}{best}{left}{risen}")


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:02:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def reading(stream: TextIO | None = None) -> Callable[[str, int, int], None]:
    """A progress for `mt.data.stream`: a line after FIRST seconds, the next after twice as long, and so on up to LAST.
    Lines of their own, since what is printed next cannot know of a line that waits to be overwritten."""
    to = sys.stderr if stream is None else stream
    begun = time.monotonic()
    due, wait = begun + FIRST, FIRST

    def tell(path: str, samples: int, tokens: int) -> None:
        nonlocal due, wait
        now = time.monotonic()
        if now >= due:
            wait = min(2 * wait, LAST)
            due = now + wait
            say(f"reading {path}: {samples:,} samples, {tokens:,} tokens so far", to)

    return tell
