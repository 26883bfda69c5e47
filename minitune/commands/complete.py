"""The command minitune complete."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from tyro.conf import Positional

from minitune.commands.flags.groups import Sampling
from minitune.config import Quant


@dataclass(frozen=True)
class Complete:
    """Let a model continue a text; the continuation alone is printed, as it is written."""

    base: Positional[Path]
    """Hugging Face folder."""
    text: Positional[str]
    """The text to continue; control strings inside it stay text."""
    adapter: Path | None = None
    """PEFT adapter folder."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    sampling: Sampling = field(default_factory=Sampling)

    def run(self) -> None:
        from minitune.api import load
        from minitune.report.terminal import speak

        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter)
        for piece in model.stream(self.text, self.max_new_tokens, **asdict(self.sampling)):
            speak(piece)
        print()
