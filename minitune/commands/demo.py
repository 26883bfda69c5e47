"""The command minitune demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Fine-tune a small shipped model on minitune's own facts and check what it learned."""

    out: Path = Path("demo-out")
    """Folder for the adapter, metrics.jsonl and loss.png; an earlier demo in it is overwritten."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""

    def run(self) -> None:
        from minitune.demo.run import run

        if not run(self.out, device=self.device):
            raise SystemExit(1)
