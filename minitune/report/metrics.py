"""MetricsFile: metrics.jsonl, one JSON object a step, complete up to the last step at any time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from minitune.training.run import Observer, Run, RunInfo, StepRecord


class MetricsFile(Observer):
    """Writes `path` anew. Keys of a line: step, loss, lr, grad_norm, n_trained, n_tokens, seconds, n_filler,
    tokens_per_second (without the filler).

    A number that is not finite is null. The file of an earlier run is replaced in one go when this one starts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_start(self, info: RunInfo) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("", encoding="utf-8")
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        if self._file is None:
            return
        line: dict[str, Any] = {**vars(record), "tokens_per_second": record.tokens_per_second}
        plain = {k: v if math.isfinite(v) else None for k, v in line.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def on_end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
