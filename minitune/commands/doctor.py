"""The command minitune doctor."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has and lacks, and check every op at a model's shapes; exit code 1 if one is wrong."""

    base: Positional[str] = "tiny"
    """Hugging Face folder, or the name of a shape (llama-2-7b, …)."""
    tokens: int | None = None
    """Tokens of the check; by default 2048 on a GPU and 64 on a CPU."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        from minitune.doctor import doctor

        if not doctor(self.base, self.device, self.dtype, self.tokens):
            raise SystemExit(1)
