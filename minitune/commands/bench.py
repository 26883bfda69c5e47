"""The command minitune bench."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from tyro.conf import Positional

from minitune.config import MemoryPolicy, Moments, Quant


@dataclass(frozen=True)
class Bench:
    """Measure how fast training is on this machine: whole steps of a model on random tokens; nothing of it is kept."""

    base: Positional[str]
    """Hugging Face folder, or the name of a shape (llama-2-7b, …), whose weights are random."""
    tokens: int = 2048
    """T, the length of a row: one micro-batch."""
    longest: int | None = None
    """Length of the documents that fill a row, in tokens; by default as long as the row and the model allow."""
    micro_batches: int = 1
    """Rows in an optimizer step."""
    seconds: float = 30.0
    """Time to measure for, about, after loading and warming up."""
    rank: int | None = None
    """Rank of the adapters on all linears of a layer; by default 16."""
    train: tuple[str, ...] = ()
    """Base weights to train instead of an adapter: full, head, norms, embedding, last:4, or name patterns."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    memory: MemoryPolicy = "auto"
    """What is kept for the backward: keep, pointwise, full, offload; auto takes the first that fits."""
    moments: Moments = "fp32"
    """AdamW's moments: fp32, or 8bit."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    out: Path | None = None
    """JSON file for the raw figures: every step, the settings, the machine."""

    def run(self) -> None:
        from minitune.bench import Setting, bench

        setting = Setting(**{each.name: getattr(self, each.name) for each in fields(Setting)})
        bench(setting, self.device, self.dtype, self.out)
