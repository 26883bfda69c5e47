"""The command minitune train."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from minitune.api import Model, load, train
from minitune.commands.shared import check_out
from minitune.config import LoRA, MemoryPolicy, Quant, Training
from minitune.data.formats import prompts_of
from minitune.data.stream import stream
from minitune.errors import InputError
from minitune.report.metrics import MetricsFile
from minitune.report.plot import LossPlot
from minitune.report.progress import progress
from minitune.report.tables import Answer, print_answers


@dataclass(frozen=True)
class Train:
    """Fine-tune a checkpoint folder on a JSONL file: an adapter, its answers, metrics and a loss curve."""

    base: Positional[Path]
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    data: Positional[Path]
    """JSONL of {"text"}, {"prompt", "completion"} or {"messages"}."""
    out: Path = Path("out")
    """Folder for the adapter, metrics.jsonl and loss.png; it must not exist yet, or be empty."""
    ask: tuple[str, ...] = ()
    """Questions to answer before and after; by default the first three prompts of the data."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    adapter: Path | None = None
    """PEFT adapter folder to go on from; its rank and targets then count."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    memory: MemoryPolicy = "auto"
    """What is kept for the backward: keep (fastest), pointwise, full (each layer's input alone), offload (that in host
    memory); auto takes the first that fits."""
    lora: LoRA = field(default_factory=LoRA)
    training: Training = field(default_factory=Training)

    def run(self) -> None:
        check_out(self.out)
        if self.adapter is not None and self.lora != LoRA():
            raise InputError("train: --adapter brings its own rank, alpha and targets; leave out the flags of LoRA")
        lora = self.lora if self.adapter is None else None
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, memory=self.memory,
                     seed=self.training.seed, lora=lora, adapter=self.adapter)
        data = stream(self.data, model.tokenizer, tokens=self.training.tokens, epochs=self.training.epochs,
                      seed=self.training.seed)
        print(data, file=sys.stderr)
        questions = self.ask or tuple(itertools.islice(prompts_of(self.data), 3))
        before = self._answers(model, questions)
        self.out.mkdir(parents=True, exist_ok=True)
        record = train(model, data, training=self.training, observers=(
            progress(), MetricsFile(self.out / "metrics.jsonl"), LossPlot(self.out / "loss.png")))
        model.save_adapter(self.out / "adapter")
        after = self._answers(model, questions)
        if questions:
            print_answers([Answer(*row) for row in zip(questions, before, after, strict=True)])
        print(f"loss {record.final_loss:.4f}, {record.tokens_per_second:,.0f} tokens/s; adapter in "
              f"{self.out / 'adapter'}")

    def _answers(self, model: Model, questions: tuple[str, ...]) -> list[str]:
        return [model.complete(question, self.max_new_tokens) for question in questions]
