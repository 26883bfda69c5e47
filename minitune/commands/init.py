"""The command minitune init."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Init:
    """Write a checkpoint with random weights in a named shape (llama-2-7b, llama-3-8b, qwen2-7b, tiny, …)."""

    shape: Positional[str]
    """The name of the shape; a wrong one lists them all."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, or be empty."""
    tokenizer: Path | None = None
    """Folder whose tokenizer files are copied; `tiny` brings the demo's by default."""
    seed: int = 0
    """Random seed of the weights."""

    def run(self) -> None:
        from minitune.api import init

        tokenizer = self.tokenizer
        if tokenizer is None and self.shape == "tiny":
            tokenizer = Path(__file__).parents[1] / "examples" / "base"
        init(self.shape, self.out, tokenizer=tokenizer, seed=self.seed)
        print(f"random weights of shape {self.shape} in {self.out}")
        if tokenizer is None:
            print("note: there is no tokenizer with them, which training on text needs: give --tokenizer FOLDER")
