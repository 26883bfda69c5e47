"""minitune evaluate: a table with the base beside its adapter, and nothing else changed."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")
import minitune as mt
from minitune.commands.evaluate import Evaluate
from minitune.commands.merge import Merge
from minitune.objectives.evaluate import evaluate
from tests.files import write_numbers


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(12), "question", "reply")


def table(printed):
    """{row's name: its cells} under the header."""
    return {line[:19].strip(): line[19:].split() for line in printed.splitlines()[1:]}


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_the_base_stands_beside_its_adapter(tiny, data, tmp_path, capsys, quant):
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2), quant=quant)
    batches = mt.data.stream(data, model.tokenizer, tokens=64, field_map={"prompt": "question", "completion": "reply"})
    base = evaluate(model, batches)
    mt.train(model, batches, epochs=3, lr=2e-2)
    adapted = evaluate(model, batches)
    assert adapted.loss < base.loss - 0.5
    model.save_adapter(tmp_path / "adapter")
    Evaluate(tiny, data, tmp_path / "adapter", quant=quant, tokens=64, dtype="float32", device="cpu",
             field_map=("prompt=question", "completion=reply")).run()
    printed = capsys.readouterr().out
    assert f"{base.n_tokens:,} trained tokens of 12 samples" in printed.splitlines()[0]
    found = table(printed)
    assert found["loss (nats a token)"] == [f"{base.loss:.4f}", f"{adapted.loss:.4f}"]
    assert found["perplexity"] == [f"{base.perplexity:,.3f}", f"{adapted.perplexity:,.3f}"]
    assert found["token accuracy"] == [f"{base.accuracy:.2%}", f"{adapted.accuracy:.2%}"]


def test_a_base_alone_has_one_column_and_long_samples_may_be_split(tiny, data, capsys):
    fields = ("prompt=question", "completion=reply")
    with pytest.raises(mt.InputError, match=r"data\.jsonl:1"):
        Evaluate(tiny, data, tokens=4, device="cpu", field_map=fields).run()
    Evaluate(tiny, data, tokens=4, device="cpu", field_map=fields, long="split").run()
    assert len(table(capsys.readouterr().out)["perplexity"]) == 1


def test_data_without_a_trained_token_is_refused(tiny, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    with pytest.raises(mt.InputError, match="nothing to train on"):
        Evaluate(tiny, path, tokens=64, device="cpu").run()


def test_merge_measures_on_the_same_data_with_the_same_names(tiny, data, tmp_path, capsys):
    mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2)).save_adapter(tmp_path / "adapter")
    fields = {"field_map": ("prompt=question", "completion=reply"), "tokens": 4, "long": "split", "device": "cpu"}
    Evaluate(tiny, data, dtype="float32", **fields).run()
    loss = table(capsys.readouterr().out)["loss (nats a token)"][0]
    Merge(tiny, tmp_path / "adapter", tmp_path / "merged", data=data, dtype="float32", **fields).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"loss {loss}: the base without the adapter" and lines[-1] == f"loss {loss}: the merged model"
