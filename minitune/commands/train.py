"""The command minitune train."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tyro.conf import Positional

from minitune.arguments import warn
from minitune.commands.flags.declared import Given
from minitune.commands.flags.settings_file import SettingsFile, as_toml
from minitune.config import Data, LoRA, MemoryPolicy, Quant, Training
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.api import Model
    from minitune.data.stream import Stream
    from minitune.training.run import Run


@dataclass(frozen=True)
class Train:
    """Fine-tune a checkpoint folder on your data: an adapter, its answers, metrics and a loss curve."""

    base: Positional[Path]
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    data: Positional[Path]
    """Samples: JSONL, JSON, text or Parquet; texts, prompts and completions, chats, preferences and more."""
    out: Path = Path("out")
    """Folder for all that the run leaves: adapters (last and best), metrics, answers, ledger, settings, loss.png; it
    must not exist yet, or be empty, unless --resume goes on with its run."""
    resume: bool = False
    """Go on with the interrupted run in --out, from its checkpoint and with the settings that it was begun with."""
    requeue: bool = False
    """For a command that a scheduler repeats: begin the run, or go on with it where --out has a checkpoint, or do
    nothing where it has ended. Give --save-every too."""
    changed: tuple[str, ...] = ()
    """With --resume: settings that are to be others from here on, by name, such as lr, max_steps, data."""
    ask: tuple[str, ...] = ()
    """Questions to answer before and after; by default the first three prompts of the data."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    adapter: Path | None = None
    """PEFT adapter folder to go on from; its rank and targets then count."""
    train: tuple[str, ...] = ()
    """Base weights to train instead of an adapter: full, head, norms, embedding, last:4, or name patterns."""
    add_tokens: tuple[str, ...] = ()
    """Texts that become tokens of their own, such as "<tool>"; their rows are trained too."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    memory: MemoryPolicy = "auto"
    """What is kept for the backward: keep (fastest), pointwise, full (each layer's input alone), offload (that in host
    memory); auto takes the first that fits."""
    dry_run: bool = False
    """Check everything up to the first step, say what it would take, and write nothing."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the folder too."""
    lora: LoRA = field(default_factory=LoRA)
    """Low-rank adapters: what is trained beside the frozen weights."""
    samples: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    given: ClassVar[Given] = frozenset()

    def run(self) -> None:
        from minitune.api.resume import check_out, one_moment
        from minitune.report.claim import claimed
        from minitune.report.tensorboard import TensorBoard

        if ("training", "beta") in self.given and self.training.objective == "sft":
            raise InputError("train: beta is given, which only the objective dpo has; say --objective dpo, or leave it "
                             "out")
        if self.requeue:
            self._repeat()
            return
        check_out(self.out, self.resume, self.changed)
        if self.resume:
            with claimed(self.out):     # a look, before the model is loaded
                pass
        boards = [TensorBoard(self.out / "tensorboard")] if self.tensorboard else []
        model = self._load()
        with one_moment(model, self.out if self.resume else None):
            self._run(model, boards)

    def _repeat(self) -> None:
        """The command as it is to be said now."""
        from minitune.api.resume import begun, clear
        from minitune.report.claim import claimed

        if self.resume or self.changed or self.dry_run:
            odd = "resume" if self.resume else "changed" if self.changed else "dry_run"
            raise InputError(f"train: requeue is given, which begins a run or goes on with it, and {odd}; leave one "
                             "out")
        stands = begun(self.out)
        if stands == "ended":
            print(f"{self.out}: the run has ended, nothing is left to do")
            return
        if stands == "lost":
            with claimed(self.out):
                clear(self.out)
        now = dataclasses.replace(self, requeue=False, resume=stands == "kept")
        object.__setattr__(now, "given", self.given - {("requeue",)})
        now.run()

    def _run(self, model: Model, boards: list[Any]) -> None:
        from minitune.api import train
        from minitune.api.examine import first_questions
        from minitune.api.training import prepare
        from minitune.data.holdout import streams
        from minitune.objectives import named, takes_pairs
        from minitune.report.progress import reading
        from minitune.report.tables import Compared, print_answers
        from minitune.training import checkpoint
        from minitune.training.interrupt import terminable

        samples = dataclasses.replace(self.samples, cache=False) if self.dry_run else self.samples
        data, valid = streams(self.data, model.tokenizer, samples, tokens=self.training.tokens,
                              epochs=self.training.epochs, seed=self.training.seed, progress=reading(),
                              pairs=takes_pairs(named(self.training)))
        questions = self.ask or first_questions(self.data, self.samples.fields())
        if self.dry_run:
            ready = prepare(model, data, valid=valid, training=self.training, out=self.out, ask=questions,
                            max_new_tokens=self.max_new_tokens, resume=self.resume, changed=self.changed)
            show_plan(model, data, valid, self.training, 0 if ready.saved is None else ready.saved.step)
            return
        try:
            with terminable():
                run = train(model, data, valid=valid, training=self.training, out=self.out, ask=questions,
                            max_new_tokens=self.max_new_tokens, resume=self.resume, changed=self.changed, quiet=False,
                            observers=[SettingsFile(self.out, self._as_toml(), bool(self.changed)), *boards],
                            config={"samples": dataclasses.asdict(self.samples)})
        except KeyboardInterrupt:
            if checkpoint.steps(self.out / checkpoint.FOLDER):
                print(f"to go on: minitune train --resume --out {shlex.quote(str(self.out))}", file=sys.stderr)
            raise
        if questions:
            before = {each.question: each.answer for each in run.evaluations[0].answers}
            print_answers([Compared(each.question, before[each.question], each.answer)
                           for each in run.evaluations[-1].answers if each.question in before])
        print(f"loss {run.final_loss:.4f}, {run.tokens_per_second:,.0f} tokens/s; {self._where(run)}")

    def _load(self) -> Model:
        from minitune.api import load

        lora: LoRA | None = self.lora
        if self.adapter is not None or self.train:
            if self.lora != LoRA() or any(path[0] == "lora" for path in self.given):
                given = "--adapter brings its own rank, alpha and targets" if self.adapter else "--train has no adapter"
                raise InputError(f"train: {given}; leave out the flags of LoRA")
            lora = None
        if ("train",) in self.given and not (self.train and all(self.train)):
            raise InputError('train: train is empty; name what is to be trained ("full", "last:4", …), or leave it out')
        names = self.train[0] if len(self.train) == 1 else self.train
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, memory=self.memory,
                     seed=self.training.seed, lora=lora, adapter=self.adapter, train=names or None,
                     add_tokens=self.add_tokens, chat_template_kwargs=self.samples.template_kwargs())
        if any(p.is_split("weight") for p in model.network.projections()) and ("training", "lr") not in self.given:
            warn(f"lr is {self.training.lr:g}, the default, which is made for adapters; whole linears usually "
                 "take 1e-5 to 5e-5 (--lr)")
        if self.training.objective == "dpo" and ("training", "lr") not in self.given:
            warn(f"lr is {self.training.lr:g}, the default, which is made for answers alone; dpo usually takes 5e-6 to "
                 "5e-5 (--lr)")
        return model

    def _as_toml(self) -> str:
        """The settings as --resume and --config read them, from any folder."""
        samples = self.samples
        valid = None if samples.valid is None else str(Path(samples.valid).absolute())
        mix = tuple(f"{Path(name).absolute()}{equals}{share}" for name, equals, share in
                    (each.rpartition("=") for each in samples.mix))
        whole = dataclasses.replace(self, samples=dataclasses.replace(samples, valid=valid, mix=mix))
        return as_toml(whole, self.given, leave=("out", "resume", "requeue", "changed", "dry_run"))

    def _where(self, run: Run) -> str:
        what = "adapter" if run.adapter is not None and run.adapter.name == "adapter" else "model"
        best = "" if run.best_adapter is None else f", the best one in {run.best_adapter}"
        return f"{what} in {run.adapter}{best}"


def show_plan(model: Model, data: Stream, valid: Stream | None, training: Training, done: int = 0) -> None:
    """What --dry-run prints: the ledgers of the data, and the plan; ``done``: steps of a run that is resumed."""
    from minitune.api.plan import plan
    from minitune.data.glued import with_glued
    from minitune.report.ledger import print_ledger
    from minitune.report.tables import print_table
    from minitune.training.hints import hints
    from minitune.training.loop import planned

    rows = plan(model, data, training, done)
    print_ledger(with_glued(data, data.ledger, model.tokenizer))
    if valid is not None:
        print()
        print_ledger(valid.ledger, title="Held out")
    print()
    print_table("What would be trained; nothing is written", ("", ""), rows)
    for hint in hints(data, training, planned(data, training), model.device, model.network):
        print(f"note: {hint}")
