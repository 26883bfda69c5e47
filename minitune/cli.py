"""The command line: train, complete, merge, init, demo, doctor, tune, their flags made from the dataclasses below."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

from minitune.api import Model, init, load, train
from minitune.checkpoint.hf_config import is_prequantized
from minitune.checkpoint.merge import Onto
from minitune.config import LoRA, MemoryPolicy, Quant, Training
from minitune.data.formats import prompts_of
from minitune.data.stream import stream
from minitune.errors import InputError
from minitune.objectives.sft import mean_loss
from minitune.report.metrics import MetricsFile
from minitune.report.plot import LossPlot
from minitune.report.progress import progress
from minitune.report.tables import Answer, print_answers
from minitune.training.loop import TrainingDiverged


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
        _check_out(self.out)
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
    """JSONL of held-out text: prints the loss of the adapter on either base and of what was written."""
    tokens: int = 2048
    """T of the batches of --data."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        _check_out(self.out)
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter)
        if self.data is not None:
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
        print(f"loss {mean_loss(model, stream(self.data, model.tokenizer, tokens=self.tokens)):.4f}: {what}")


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

    def run(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None and self.shape == "tiny":
            tokenizer = Path(__file__).parent / "examples" / "base"
        init(self.shape, self.out, tokenizer=tokenizer, seed=self.seed)
        print(f"random weights of shape {self.shape} in {self.out}")


@dataclass(frozen=True)
class Demo:
    """Fine-tune a small shipped model on minitune's own facts and check what it learned."""

    out: Path = Path("demo-out")
    """Folder for the adapter, metrics.jsonl and loss.png; an earlier demo in it is overwritten."""
    device: str | None = None

    def run(self) -> None:
        from minitune.demo.run import run

        if not run(self.out, device=self.device):
            raise SystemExit(1)


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


@dataclass(frozen=True)
class Tune:
    """Measure on this GPU which way of attention and of the LoRA products is the fastest; training then takes it."""

    base: Positional[str]
    """Hugging Face folder, or the name of a shape (llama-2-7b, …)."""
    tokens: int = 16384
    """T of a micro-batch."""
    longest: int = 2048
    """The longest document."""
    rank: int = 16
    device: str | None = None
    """cuda; by default the GPU."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        from minitune.doctor import tune

        path = tune(self.base, self.device, self.dtype, self.tokens, self.longest, self.rank)
        print(f"written to {path}; training takes these ways from now on")


Command = (Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Complete, tyro.conf.subcommand("complete")]
           | Annotated[Merge, tyro.conf.subcommand("merge")] | Annotated[Init, tyro.conf.subcommand("init")]
           | Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Doctor, tyro.conf.subcommand("doctor")]
           | Annotated[Tune, tyro.conf.subcommand("tune")])


DESCRIPTION = "Fine-tune Llama-family models with LoRA on one NVIDIA GPU or a CPU."


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; name another folder, or remove it")


def main(args: list[str] | None = None) -> None:
    """Run one command. User errors end in one line on stderr and exit code 2."""
    try:
        command = tyro.cli(Command, prog="minitune", description=DESCRIPTION, args=args,
                           config=(OmitArgPrefixes, OmitSubcommandPrefixes))
        command.run()
    except InputError as error:
        print(f"minitune: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"minitune: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (TrainingDiverged, MemoryError, torch.OutOfMemoryError) as error:
        print(f"minitune: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:       # torch's allocator of host memory has no exception of its own
        found = re.search(r"tried to allocate (\d+) bytes", str(error))
        if found is None:
            raise
        print(f"minitune: out of memory: {int(found[1]) / 1e9:,.1f} GB more are needed; take fewer tokens, a smaller "
              "rank or model, or --quant nf4-dq", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
