"""MetricsFile and AnswersFile: metrics.jsonl and answers.jsonl, complete up to the last event at any time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from minitune.arguments import warn
from minitune.checkpoint.files import staged
from minitune.errors import NotSaved
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord
from minitune.training.runner import is_told


class JsonLines:
    """A file of JSON objects, a line each, flushed at once; opening it replaces an older file in one go.

    A number that is not finite becomes null. NotSaved where a line cannot be written; the file is closed then.
    """

    def __init__(self, path: Path) -> None:
        with staged(path.parent) as staging:
            staging.write(path.name, b"")
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write(json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):     # what could not be written is tried once more
                self._file.close()
            raise NotSaved(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def close(self, run: Run) -> None:
        """Warns where the file was removed meanwhile: what is written to it then goes nowhere, and fails nowhere. A run
        without a step removes it itself."""
        removed = not self._file.closed and os.name == "posix" and os.fstat(self._file.fileno()).st_nlink == 0
        self._file.close()
        if removed and run.records:
            warn(f"{self._path}: was removed while the run wrote it, and its lines are lost")


class MetricsFile(Observer):
    """Writes `path` anew. Keys of a step's line: the fields of StepRecord and tokens_per_second (without the filler);
    of an evaluation's: step, valid_loss, valid_perplexity (of pairs null), valid_accuracy, valid_tokens,
    evaluation_seconds, and of pairs valid_chosen and valid_rejected."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: JsonLines | None = None

    def on_start(self, info: RunInfo) -> None:
        self._lines = JsonLines(self.path)

    def on_resume(self, run: Run) -> None:
        """The lines up to the checkpoint, anew: what came after it is done again."""
        self.on_start(run.info)
        done: list[StepRecord | EvaluationRecord] = [r for r in run.records if is_told(r, run.info)]
        for each in sorted([*done, *run.evaluations], key=lambda each: each.step):      # an evaluation after its step
            if isinstance(each, StepRecord):
                self.on_step(each)
            else:
                self.on_evaluation(each)

    def on_step(self, record: StepRecord) -> None:
        if self._lines is not None:
            self._lines.write({**vars(record), "tokens_per_second": record.tokens_per_second})

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if self._lines is not None and record.loss is not None:
            self._lines.write({"step": record.step, "valid_loss": record.loss, "valid_perplexity": record.perplexity,
                               "valid_accuracy": record.accuracy, "valid_tokens": record.n_tokens,
                               "evaluation_seconds": record.seconds,
                               **({} if record.chosen is None else {"valid_chosen": record.chosen,
                                                                    "valid_rejected": record.rejected})})

    def on_end(self, run: Run) -> None:
        if self._lines is not None:
            self._lines.close(run)
            self._lines = None


class AnswersFile(Observer):
    """Writes `path` anew, where anything is asked: a line {"step", "question", "answer"} for each answer."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: JsonLines | None = None

    def on_resume(self, run: Run) -> None:
        """The lines up to the checkpoint, anew."""
        for record in run.evaluations:
            self.on_evaluation(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        for each in record.answers:
            if self._lines is None:
                self._lines = JsonLines(self.path)
            self._lines.write({"step": record.step, "question": each.question, "answer": each.answer})

    def on_end(self, run: Run) -> None:
        if self._lines is not None:
            self._lines.close(run)
            self._lines = None
