"""The command minitune complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from minitune.api import load
from minitune.config import Quant


@dataclass(frozen=True)
class Complete:
    """Let a model continue a text; the continuation alone is printed."""

    base: Positional[Path]
    """Hugging Face folder."""
    text: Positional[str]
    """The text to continue; control strings inside it stay text."""
    adapter: Path | None = None
    """PEFT adapter folder."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 is greedy, more is bolder."""
    top_k: int | None = None
    """Draw among so many likeliest tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens whose probabilities reach this."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    seed: int | None = None
    """Random seed of the draws."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""

    def run(self) -> None:
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter)
        print(model.complete(self.text, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.stop,
                             self.seed))
