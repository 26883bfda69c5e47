"""The main job from end to end, checked: ask the small base, fine-tune it on our own facts, ask again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.api import Model, load, train
from minitune.config import LoRA, Training
from minitune.data.stream import stream
from minitune.demo.questions import QUESTIONS
from minitune.errors import InputError
from minitune.objectives.evaluate import evaluate
from minitune.report.metrics import MetricsFile
from minitune.report.plot import LossPlot
from minitune.report.tables import Compared, print_answers, print_table

EXAMPLES = Path(__file__).parents[1] / "examples"
LORA = LoRA(rank=16, alpha=32)
TRAINING = Training(tokens=2048, lr=5e-3)
FACT_REPEATS = 80
"""How often each fact stands in the training file: about 4 tokens of facts for 6 of replay."""
HELD_OUT_RISE = 0.1
"""By so many nats the loss on text of the base's own kind may rise."""
MAX_NEW_TOKENS = 56


@dataclass(frozen=True)
class State:
    """What is asked of the model before and after training: its answers, and its mean loss on the held-out text."""

    answers: tuple[str, ...]
    held_out: float


def run(out: str | Path, *, device: str | torch.device | None = None) -> bool:
    """Fine-tune the shipped base on minitune's own facts and print before beside after -> whether every check holds.

    Writes train.jsonl, adapter/, metrics.jsonl and loss.png into `out`, over those of an earlier demo. The checks: each
    greedy answer lacks its key phrase before and contains it after; the held-out loss rises by at most HELD_OUT_RISE;
    the adapter, loaded again, answers the same. Raises InputError, and writes nothing, where the shipped files or the
    device are missing, and where `out` holds anything else.
    """
    out = Path(out)
    base = EXAMPLES / "base"
    if not (base / "model.safetensors").is_file():
        raise InputError(f"{base}: the demo's base model is missing; build it with: make base")
    check_out(out)
    model = load(base, device=device, lora=LORA)
    out.mkdir(parents=True, exist_ok=True)
    data = write_training_file(out / "train.jsonl")
    print(f"base: {base} on {model.device}; training data: {data}", flush=True)
    before = examine(model)
    record = train(model, data, training=TRAINING, quiet=False, observers=(
        MetricsFile(out / "metrics.jsonl"), LossPlot(out / "loss.png", "minitune demo")))
    adapter = out / "adapter"
    model.save_adapter(adapter)
    after = examine(model)
    reloaded = load(base, device=device, adapter=adapter).complete(QUESTIONS[0].prompt, MAX_NEW_TOKENS).strip()
    table = [Compared(question.text, old, new, question.key)
             for question, old, new in zip(QUESTIONS, before.answers, after.answers, strict=True)]
    print_answers(table)
    print(f"\n{record.tokens_per_second:,.0f} tokens/s; adapter in {adapter}; loss curve in {out / 'loss.png'}; "
          f"every step in {out / 'metrics.jsonl'}\n")
    return report(checks(table, before.held_out, after.held_out, reloaded))


def check_out(out: Path) -> None:
    """InputError unless `out` is free, empty, or an earlier demo's, which its training file tells."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder (--out)")
    if any(out.iterdir()) and not _is_demos(out / "train.jsonl"):
        raise InputError(f"{out}: holds files that are no earlier demo's; name another folder (--out), or empty it")


def _is_demos(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return QUESTIONS[0].text.encode() in file.readline(1000)


def write_training_file(path: Path) -> Path:
    """facts.jsonl FACT_REPEATS times, and replay.jsonl once: text of the base's kind, so that it forgets nothing."""
    facts = (EXAMPLES / "facts.jsonl").read_text("utf-8")
    path.write_text(facts * FACT_REPEATS + (EXAMPLES / "replay.jsonl").read_text("utf-8"), encoding="utf-8")
    return path


@torch.no_grad()
def examine(model: Model) -> State:
    """The greedy answers to all questions, and the mean loss over the tokens of heldout.jsonl."""
    model.eval()
    batches = stream(EXAMPLES / "heldout.jsonl", model.tokenizer, tokens=TRAINING.tokens, shuffle=False)
    held_out = evaluate(model, batches).loss
    answers = tuple(model.complete(question.prompt, MAX_NEW_TOKENS).strip() for question in QUESTIONS)
    return State(answers, held_out)


def checks(table: list[Compared], held_before: float, held_after: float, reloaded: str) -> list[tuple[str, str, bool]]:
    """(what is checked, what was seen, whether it holds), one row a check."""
    unknown = sum(answer.phrase is not None and answer.phrase not in answer.before for answer in table)
    learned = sum(answer.learned is True for answer in table)
    rise = held_after - held_before
    return [
        ("no key phrase before training", f"{unknown} of {len(table)} answers", unknown == len(table)),
        ("every key phrase after training", f"{learned} of {len(table)} answers", learned == len(table)),
        (f"held-out loss rises by at most {HELD_OUT_RISE} nat", f"{held_before:.4f} -> {held_after:.4f} ({rise:+.4f})",
         rise <= HELD_OUT_RISE),
        ("the saved adapter answers the same", f'"{reloaded}"', reloaded == table[0].after),
    ]


def report(rows: list[tuple[str, str, bool]]) -> bool:
    """Print the checks; whether all of them hold."""
    print_table("Checks", ["check", "seen", "holds"], [(what, seen, "yes" if ok else "NO") for what, seen, ok in rows])
    return all(ok for _, _, ok in rows)
