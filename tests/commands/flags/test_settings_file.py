"""as_toml: what a command was given comes back through --config, whatever the texts hold."""

from __future__ import annotations

import tomllib

import pytest

pytest.importorskip("tyro")
from hypothesis import given
from hypothesis import strategies as st

from minitune.commands.flags.parse import parse
from minitune.commands.flags.settings_file import as_toml
from minitune.commands.train import Train
from minitune.config import Data, LoRA, Training

WORDS = ["base", "data.jsonl", "--out", "o", "--ask", "wh\"y\\?", "\U0001f642 é\nb", "--lr", "1e-5",
         "--rank-pattern", "q_proj", "4", "--targets", "q_proj", "v_proj", "--no-cache"]


def test_what_was_given_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = parse("train", [*WORDS, "--epochs", "1", "--quant", "nf4", "--dora"])
    text = as_toml(first, first.given, leave=("out",))
    assert "epochs = 1\n" in text and "seed" not in text and "out" not in tomllib.loads(text)
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir("/")
    second = parse("train", ["--config", str(tmp_path / "a.toml"), "--out", "o"])
    assert (second.base, second.data) == (tmp_path / "base", tmp_path / "data.jsonl")
    assert (second.ask, second.lora, second.training, second.samples, second.quant, second.given) == (
        first.ask, first.lora, first.training, first.samples, first.quant,
        first.given | {("base",), ("data",), ("config",)})


@given(st.lists(st.text(st.characters(codec="utf-8"))), st.floats(1e-9, 1.0), st.integers(1, 64))
def test_any_text_and_number(texts, lr, rank):
    command = Train(base="a", data="b", ask=tuple(texts), lora=LoRA(rank=rank, rank_pattern={"q_proj": rank}),
                    training=Training(lr=lr), samples=Data(mix=("a=b.jsonl=0.5",)))
    found = tomllib.loads(as_toml(command, frozenset()))
    assert tuple(found.get("ask", ())) == tuple(texts)
    assert found.get("training", {}).get("lr", 2e-4) == lr
    assert found["lora"]["rank_pattern"] == {"q_proj": rank} and found["samples"]["mix"] == ["a=b.jsonl=0.5"]
