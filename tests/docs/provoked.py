"""Faults of every area, each provoked as a user would: docs/errors.md quotes what minitune says to them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import minitune as mt
from minitune.report.claim import claimed
from tests.docs.blocks import minitune

ROWS: dict[str, str] = {
    "broken": '{"text": "a",}',
    "no-object": '["a"]',
    "twice": '{"text": "a", "text": "b"}',
    "unknown": '{"body": "a"}',
    "misspelt": '{"promt": "a", "completion": " b"}',
    "half": '{"prompt": "a"}',
    "mixed": '{"prompt": "a", "completion": "b", "text": "a b"}',
    "image": '{"prompt": "a", "completion": " b", "images": ["a.png"]}',
    "number": '{"prompt": 3, "completion": " b"}',
    "empty": '{"prompt": "a", "completion": ""}',
    "weight": '{"text": "a", "weight": -1}',
    "label": '{"prompt": "a", "completion": " b", "label": 1}',
    "no-label": '{"prompt": "a", "completion": " b", "label": null}',
    "role": '{"messages": [{"role": "asistant", "content": "a"}]}',
    "silent": '{"messages": [{"role": "user", "content": "a"}]}',
    "turn-weight": '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
    "part": '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
    "nothing": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
    "tools": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
             '"tools": [{"type": "function", "function": {"name": "clock"}}]}',
    "long": '{"text": "' + "word " * 90 + '"}',
}
"""File -> its one line, which cannot be trained on."""
GOOD = '{"prompt": "a", "completion": " b"}\n{"prompt": "c", "completion": " d"}\n'
TEMPLATE = '{% for m in messages %}{% if m.role != "system" %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}'
MARKS_ALL = "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}"

COMMANDS = [
    "train my-llama goood.jsonl",
    "train my-llama table.csv",
    "train my-llama empty-file.jsonl",
    "train my-llama good.jsonl --field-map promt=question",
    "train my-llama good.jsonl --field-map prompt=question",
    "train my-llama good.jsonl --mix more.jsonl",
    "train my-llama good.jsonl --valid good.jsonl --valid-split 0.1",
    "train my-llama good.jsonl --valid-split 5",
    "train my-llama good.jsonl --rnak 8",
    "train my-llama good.jsonl --train",
    "train --train full my-llama good.jsonl --lr 1e-5",
    "train my-llama good.jsonl --tokens 0",
    "train my-llama good.jsonl --momentum 0.5",
    "train my-llama good.jsonl --learning-rate 1e-4",
    "train my-llama good.jsonl --rank many",
    "train my-llama good.jsonl --schedule cosin",
    "train my-llama",
    "trian my-llama good.jsonl",
    "train my-llama good.jsonl --lr nan",
    "train my-llama good.jsonl --rank 0",
    "train my-llama good.jsonl --dropout 1",
    "train my-llama good.jsonl --out full-folder",
    "train my-llama good.jsonl --train full --rank 8",
    "train my-llama good.jsonl --train last:99",
    "train my-llama good.jsonl --targets q_porj",
    "train my-llama good.jsonl --rank-pattern q_proj",
    "train my-llama good.jsonl --optimizer adamw_8bit",
    "train my-llama good.jsonl --load-in-4bit",
    "train my-llama good.jsonl --save-steps 50",
    "train my-llama good.jsonl --save-total-limit 2",
    "train my-llama good.jsonl --resume-from-checkpoint run",
    "train my-llama good.jsonl --resume",
    "train my-llama good.jsonl --resume --out good.jsonl",
    "train my-llama good.jsonl --resume --out full-folder",
    "train my-llama good.jsonl --resume --out a-run",
    "train my-llama good.jsonl --resume --out ended",
    "train my-llama good.jsonl --resume --out torn-run --max-steps 3",
    "train my-llama good.jsonl --resume --out stopped --max-steps 3 --lr 1e-3",
    "train my-llama good.jsonl --resume --out stopped --max-steps 3 --micro-batches 2",
    "train my-llama good.jsonl --out stopped",
    "train my-llama good.jsonl --resume --out held-run",
    "train my-llama good.jsonl --wandb",
    "train --model_name_or_path my-llama good.jsonl",
    "train my-llama good.jsonl --mix good.jsonl=0.1",
    "train my-llama cut.jsonl --long truncate --tokens 16",
    "train my-llama two-columns.parquet",
    "train marks-all system.jsonl",
    "complete a-run a",
    "complete my-llama a --adapter odd-adapter",
    "complete my-llama a --adapter spoilt-adapter",
    "train my-llama good.jsonl --device cuda",
    "train my-llama good.jsonl --evaluate-every 2 --config bad.toml",
    "train my-llama good.jsonl --config typo.toml",
    "train nowhere good.jsonl",
    "train no-tokenizer good.jsonl",
    "train torn good.jsonl",
    "train unknown-model good.jsonl",
    "train pickled good.jsonl",
    "complete my-llama a --adapter no-adapter",
    "complete my-llama a --adapter other-adapter",
    "complete my-llama a --top-p 0",
    "train my-llama good.jsonl --quant nf4 --train full",
    "merge my-llama other-adapter full-folder",
    "train has-template system.jsonl",
    "train my-llama good.jsonl --tokens 3000000000",
]
"""Command lines that end with exit code 2."""


def _python() -> list[Callable[[], object]]:
    model = mt.load("my-llama")
    adapted = mt.load("my-llama", lora=mt.LoRA(rank=2))
    masked = mt.data.pack([([1, 5, 6], [-100, -100, -100])], tokens=8)[0]
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    return [
        lambda: mt.train(model, "good.jsonl", tokens=64),
        lambda: mt.train(adapted, "good.jsonl", learning_rate=1e-4),
        lambda: mt.train(adapted, "good.jsonl", tokens=64, evaluate_every=2),
        lambda: mt.LoRA(r=8, lora_alpha=16),
        lambda: mt.load("my-llama", load_in_4bit=True),
        lambda: model.tokenizer("text", return_tensors="pt"),
        lambda: mt.load("my-llama", lora=mt.LoRA(targets="q_porj")),
        lambda: mt.load("my-llama", lora=mt.LoRA(), adapter="other-adapter"),
        lambda: adapted.loss(masked),
        lambda: mt.Batch(tokens=torch.tensor([1, 5, 6]), labels=torch.tensor([1, 5, -100]), cu_seqlens=bounds),
        lambda: adapted.generate([5000], max_new_tokens=1),
        lambda: adapted.chat([{"role": "assistant", "content": "a"}]),
        lambda: adapted.save("saved"),
        lambda: adapted.to(torch.float16),
        lambda: mt.train(adapted, "good.jsonl", tokens=64, save_every=2),
        lambda: mt.train(adapted, iter([masked]), tokens=64, max_steps=3, out="stopped", resume=True),
        lambda: mt.train(adapted, "good.jsonl", tokens=64, lr=1e30, clip=0, warmup=0, max_steps=9),
        lambda: mt.train(mt.load("my-llama", lora=mt.LoRA(rank=2)),
                         [{"prompt": "a", "completion": " b", "weight": 9e29}], tokens=64, max_steps=1, max_skipped=0),
        lambda: mt.train(mt.load("my-llama", lora=mt.LoRA(rank=2)), "good.jsonl", tokens=64, lr=1e39, clip=0, warmup=0,
                         max_steps=9),
        lambda: mt.train(mt.load("my-llama", lora=mt.LoRA(rank=2)), "good.jsonl", tokens=64, objective=_spoiler(),
                         max_steps=9, save_every=1, out="spoilt", ask=()),
        lambda: mt.train(mt.load("my-llama", lora=mt.LoRA(rank=2)), [{"prompt": "a", "completion": " b"}], tokens=64,
                         objective=_spiker(), max_steps=41, spikes="stop"),
    ]


def _spiker() -> Callable[[Any, mt.Batch], tuple[torch.Tensor, int]]:
    """An objective whose 40th step has a loss that is a hundred times as high."""
    calls = []

    def objective(model: Any, batch: mt.Batch) -> tuple[torch.Tensor, int]:
        calls.append(batch)
        total, n = model.loss_sum(batch)
        return total * (100 if len(calls) == 40 else 1), n

    return objective


def _spoiler() -> Callable[[Any, mt.Batch], tuple[torch.Tensor, int]]:
    """An objective that after its first step makes the weights what no training should."""
    calls = []

    def objective(model: Any, batch: mt.Batch) -> tuple[torch.Tensor, int]:
        calls.append(batch)
        if len(calls) > 1:
            model.trainable_parameters()[0].data.fill_(float("nan"))
        total, n = model.loss_sum(batch)
        return total, n

    return objective


def prepare() -> None:
    """Puts the files that the recipes name into the current folder, beside my-llama."""
    for name, line in ROWS.items():
        Path(f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
    for name, text in {
            "good.jsonl": GOOD, "empty-file.jsonl": "", "table.csv": "a,b\n", "bad.toml": "lr = \n",
            "typo.toml": "[lora]\nrnak = 8\n",
            "cut.jsonl": '{"prompt": "' + "word " * 30 + '", "completion": " b"}\n',
            "system.jsonl": '{"messages": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": '
                            '"a"}, {"role": "assistant", "content": "b"}]}\n'}.items():
        Path(name).write_text(text, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), "two-columns.parquet")
    for name in ("no-adapter", "full-folder", "pickled"):
        Path(name).mkdir()
    Path("full-folder/notes.txt").write_text("mine")
    for name in ("no-tokenizer", "torn", "unknown-model", "has-template", "marks-all"):
        shutil.copytree("my-llama", name)
    Path("no-tokenizer/tokenizer.model").unlink()
    weights = Path("torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100_000])
    config = json.loads(Path("my-llama/config.json").read_text())
    Path("unknown-model/config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    shutil.copy("my-llama/config.json", "pickled")
    Path("pickled/pytorch_model.bin").write_bytes(b"x")
    Path("has-template/chat_template.jinja").write_text(TEMPLATE)
    Path("marks-all/chat_template.jinja").write_text(MARKS_ALL)
    Path("a-run/adapter").mkdir(parents=True)
    Path("a-run/environment.json").write_text("{}")
    Path("a-run/config.json").write_text('{"model": {"path": "my-llama"}, "quant": null}')
    mt.init("tiny", "tiny", tokenizer="my-llama")
    mt.load("tiny", lora=mt.LoRA(rank=2)).save_adapter("other-adapter")
    mt.load("my-llama", lora=mt.LoRA(rank=2), quant="nf4").save_adapter("odd-adapter")
    Path("odd-adapter/minitune.json").write_text('{"quant": "int8"}')
    shutil.copytree("other-adapter", "spoilt-adapter")
    with open("spoilt-adapter/adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    _stopped("stopped")
    shutil.copytree("stopped", "torn-run")
    shutil.copytree("stopped", "held-run")
    tensors = Path("torn-run/checkpoint/step-1.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    mt.train(mt.load("my-llama", lora=mt.LoRA(rank=2)), "good.jsonl", max_steps=1, out="ended", ask=())


class _Impatient:
    def on_step(self, record: object) -> None:
        raise KeyboardInterrupt


def _stopped(out: str) -> None:
    """A run of three steps by the defaults of the command line, which Ctrl-C ended after the first one."""
    with contextlib.suppress(KeyboardInterrupt):
        mt.train(mt.load("my-llama", lora=mt.LoRA()), "good.jsonl", max_steps=3, out=out, observers=[_Impatient()])


def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """(what was done, the message that it ended with) of each recipe, in the folder that `prepare` filled.
    AssertionError where it ended otherwise."""
    for line in COMMANDS:
        with claimed(Path("held-run")):     # as another process does
            ran = minitune(monkeypatch, line.split())
        _, begun, message = f"\n{ran.err}".partition("\nminitune: ")
        assert ran.code == 2 and begun, f"minitune {line}: exit code {ran.code}\n{ran.out}{ran.err}"
        yield f"minitune {line}", message
    tokenizer = mt.data.load_tokenizer("my-llama")
    for name in ROWS:
        with pytest.raises(mt.InputError) as refused:
            mt.data.stream(f"{name}.jsonl", tokenizer, tokens=64)
        yield f"stream {name}.jsonl", str(refused.value)
    for place, call in enumerate(_python()):
        with pytest.raises((mt.InputError, mt.TrainingDiverged)) as found:
            call()
        yield f"call {place}", str(found.value)
