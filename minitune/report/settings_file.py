"""SettingsFile: a command's settings in the folder of the run that it begins."""

from __future__ import annotations

from pathlib import Path

from minitune.training.run import Observer, Run, RunInfo


class SettingsFile(Observer):
    """Writes `text` into `path`. It may hold the bytes of a command line, which need be no text."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_start(self, info: RunInfo) -> None:
        self.path.write_bytes(self.text.encode("utf-8", "surrogateescape"))

    def on_resume(self, run: Run) -> None:
        """The file stays that of the run as it was begun."""
