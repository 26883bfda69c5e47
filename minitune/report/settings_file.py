"""SettingsFile: a command's settings in the folder of the run that it begins."""

from __future__ import annotations

from pathlib import Path

from minitune.checkpoint.files import staged
from minitune.training.run import Observer, Run, RunInfo


class SettingsFile(Observer):
    """Writes `text` into `path`; a run that ended before its first step leaves no such file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self._begun = path, text, False

    def on_start(self, info: RunInfo) -> None:
        self._begun = True
        with staged(self.path.parent) as staging:
            staging.write(self.path.name, self.text.encode())

    def on_resume(self, run: Run) -> None:
        """The file stays that of the run as it was begun."""

    def on_end(self, run: Run) -> None:
        if self._begun and not run.records:
            self.path.unlink(missing_ok=True)
