"""Completions that stick to their prompts are said before step 1, with their lines; chats and texts never are."""

from __future__ import annotations

import json
import warnings

import pytest

import minitune as mt
from minitune.cli import main
from minitune.data.glued import LOOKED_AT, with_glued
from tests.files import BASE, records, write_numbers

TEXT = "the completion begins right behind the prompt's last word"


@pytest.fixture(scope="module")
def tokenizer():
    return mt.data.load_tokenizer(BASE)


def notes(tokenizer, path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stream = mt.data.stream(path, tokenizer, tokens=256)
    found = with_glued(stream, stream.ledger, tokenizer)
    more = len(found.notes) - len(stream.ledger.notes)
    assert more in (0, 1) and found.notes[more:] == stream.ledger.notes and found.sources == stream.ledger.sources
    return [str(note) for note in found.notes if TEXT in note.text]


def pairs(prompt, completion, n=3):
    return [{"prompt": f"{prompt} {i} is", "completion": f"{completion}{i}."} for i in range(n)]


def test_a_missing_blank_is_said_with_its_lines(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    assert notes(tokenizer, path, pairs("Number", "")) == [
        f'3 samples: {TEXT}: begin completions with a blank, as in "completion": " Yes." ({path}:1, 2, 3)']
    assert notes(tokenizer, path, pairs("Число", "ответ")) and notes(tokenizer, path, pairs("Number", " ")) == []


@pytest.mark.parametrize("rows", [
    [{"prompt": "Is it?", "completion": "Yes."}], [{"prompt": "Say:", "completion": "Yes."}],
    [{"prompt": "Say\n", "completion": "Yes."}], [{"prompt": "Say", "completion": "\nYes."}],
    [{"prompt": "Say", "completion": ", yes."}], [{"prompt": "问题", "completion": "答案"}],
    [{"text": "one two three"}],
    [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}],
    [{"instruction": "Say hello", "output": "Hello"}]], ids=str)
def test_what_does_not_stick(tokenizer, tmp_path, rows):
    assert notes(tokenizer, tmp_path / "a.jsonl", rows) == []


def test_most_of_them_must_stick(tokenizer, tmp_path):
    glued, good = pairs("Glued", "", 3), pairs("Number", " ", 3)
    assert notes(tokenizer, tmp_path / "a.jsonl", glued + good) == []
    (said,) = notes(tokenizer, tmp_path / "a.jsonl", glued + good[:2])
    assert said.startswith(f"3 samples: {TEXT}, of 5 looked at: ") and said.endswith("a.jsonl:1, 2, 3)")


def test_of_a_large_file_some_are_looked_at(tokenizer, tmp_path):
    (said,) = notes(tokenizer, tmp_path / "a.jsonl", pairs("Number", "", 3 * LOOKED_AT))
    assert said.startswith(f"{LOOKED_AT} samples: ") and ":1, 4, 7," in said and said.endswith(", …)")


def test_train_its_dry_run_and_inspect_say_it(tiny, tmp_path, capsys):
    pytest.importorskip("tyro")
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs("Number", "")))
    flags = ["train", str(tiny), str(data), "--out", str(tmp_path / "run"), "--tokens", "64", "--device", "cpu",
             "--max-new-tokens", "1"]
    main(["inspect", str(tiny), str(data), "--tokens", "64"])
    main([*flags, "--dry-run"])
    main(flags)
    said = capsys.readouterr()
    assert said.out.count(f"note: 3 samples: {TEXT}") == 2 and said.err.count(f"note: 3 samples: {TEXT}") == 1
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert TEXT in ledger["train"]["notes"][0]["text"] and records(tmp_path / "run" / "metrics.jsonl")
    model = mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2))
    with pytest.warns(UserWarning, match=f"train data: 3 samples: {TEXT}"):
        mt.train(model, data, tokens=64, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.train(model, write_numbers(data, range(9)), tokens=64, max_steps=1)
