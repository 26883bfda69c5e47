"""The command minitune merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from minitune.api import Model, load
from minitune.checkpoint.hf_config import is_prequantized
from minitune.checkpoint.merge import Onto
from minitune.commands.shared import check_out
from minitune.config import Quant
from minitune.data.stream import stream
from minitune.objectives.evaluate import evaluate


@dataclass(frozen=True)
class Merge:
    """Add an adapter into its base: a checkpoint folder for transformers, vLLM or further training."""

    base: Positional[Path]
    """Hugging Face folder that the adapter was trained on."""
    adapter: Positional[Path]
    """PEFT adapter folder."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, or be empty."""
    quant: Quant | None = None
    """nf4 or nf4-dq, if the adapter was trained on the base in 4 bits."""
    onto: Onto = "loaded"
    """In 4 bits: loaded merges into the decoded weights, which the adapter was trained on, original into the 16-bit
    weights of the folder."""
    data: Path | None = None
    """Held-out samples, in any format that training takes: prints the loss on them of the base, of the adapter (in 4
    bits on either base) and of what was written."""
    tokens: int = 2048
    """T, the length of one packed batch of --data; no sample may be longer."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        check_out(self.out)
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter)
        if self.data is not None:
            with model.adapter_disabled():
                self._say("the base without the adapter", model)
            self._say("the adapter on the base as it was loaded", model)
        model.save_merged(self.out, self.onto)
        in_4bit = bool(model.network.nf4_shapes())
        del model
        print(f"merged model in {self.out}")
        if self.data is None:
            return
        if in_4bit and not is_prequantized(self.base):
            self._say("the adapter on the 16-bit base",
                      load(self.base, device=self.device, dtype=self.dtype, adapter=self.adapter))
        self._say("the merged model", load(self.out, device=self.device, dtype=self.dtype))

    def _say(self, what: str, model: Model) -> None:
        assert self.data is not None
        found = evaluate(model, stream(self.data, model.tokenizer, tokens=self.tokens))
        print(f"loss {found.loss:.4f}: {what}")
