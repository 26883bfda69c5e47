"""The command minitune tune."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Tune:
    """Measure on this GPU which way of attention and of the LoRA products is the fastest; training then takes it."""

    base: Positional[str]
    """Hugging Face folder, or the name of a shape (llama-2-7b, …)."""
    tokens: int = 16384
    """T of a micro-batch, as you will train with."""
    longest: int = 2048
    """Length of the longest document, in tokens."""
    rank: int = 16
    """Rank of the adapters, as you will train with."""
    device: str | None = None
    """cuda; by default the GPU."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        from minitune.tune import tune

        path = tune(self.base, self.device, self.dtype, self.tokens, self.longest, self.rank)
        print(f"written to {path}; training takes these ways from now on")
