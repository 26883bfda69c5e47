"""TensorBoard: an observer that writes event files for tensorboard, where that optional package is installed."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from minitune.errors import InputError
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord


class TensorBoard(Observer):
    """Writes train/…, valid/… and answers/… into `folder`, from the first step on. InputError at once where the package
    tensorboard is missing."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("TensorBoard's files need the package tensorboard, which is not installed; say: pip "
                             "install 'minitune[tensorboard]'") from error
        self.folder, self._make = Path(folder), SummaryWriter
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        self._writer = self._make(str(self.folder))

    def on_resume(self, run: Run) -> None:
        # what event files have of later steps, which are done again, is not shown then
        self._writer = self._make(str(self.folder), purge_step=len(run.records) + 1)

    def on_step(self, record: StepRecord) -> None:
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "memory"):
            self._scalar(f"train/{name}", getattr(record, name), record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        for name in ("loss", "perplexity", "accuracy", "chosen", "rejected"):
            self._scalar(f"valid/{name}", getattr(record, name), record.step)
        for place, each in enumerate(record.answers):
            # four blanks: a block of code, since answers are no markdown
            lines = f"{each.question}\n\n{each.answer}".splitlines()
            self._writer.add_text(f"answers/{place}", "\n".join(f"    {line}" for line in lines), record.step)
        self._writer.flush()

    def on_end(self, run: Run) -> None:
        """A run that ended before its first step leaves no files."""
        if self._writer is None:
            return
        self._writer.close()
        if not run.records:
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink()
            with contextlib.suppress(OSError):      # it holds something else
                self.folder.rmdir()

    def _scalar(self, name: str, value: float | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)
