"""as_toml: what a command was given comes back through --config, whatever the texts hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

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


def test_files_named_among_the_settings_are_found_from_elsewhere(tmp_path, monkeypatch):
    """As base and data are: ".." behind a link is the link's folder's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "in")
    (tmp_path / "far" / "v.jsonl").write_text("a")
    first = parse("train", ["base", "data", "--valid", "link/../v.jsonl", "--mix", "link/../v.jsonl=0.5"])
    (tmp_path / "a.toml").write_text(first._as_toml(), encoding="utf-8")
    monkeypatch.chdir("/")
    second = parse("train", ["--config", str(tmp_path / "a.toml")])
    assert Path(second.samples.valid).read_text() == "a"
    assert [Path(name).exists() for name in second.samples.shares("x") if name != "x"] == [True]


def test_resume_reads_the_settings_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "train.toml").write_text('base = "b"\ndata = "d"\n[training]\nlr = 0.5\n')
    out = ["--out", str(tmp_path)]
    assert parse("train", ["--resume", *out]).training.lr == 0.5
    assert parse("train", ["--resume", *out, "--lr", "0.25"]).training.lr == 0.25
    assert parse("train", ["b", "d", "--resume", "--no-resume", *out]).training.lr != 0.5
    assert parse("train", ["b", "d", *out]).training.lr != 0.5
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path.parent / "out").mkdir()
    (tmp_path / "train.toml").rename(tmp_path.parent / "out" / "train.toml")
    assert parse("train", ["--resume"]).training.lr == 0.5


@given(st.lists(st.text(st.characters(codec="utf-8"))), st.floats(1e-9, 1.0), st.integers(1, 64))
def test_any_text_and_number(texts, lr, rank):
    command = Train(base="a", data="b", ask=tuple(texts), lora=LoRA(rank=rank, rank_pattern={"q_proj": rank}),
                    training=Training(lr=lr), samples=Data(mix=("a=b.jsonl=0.5",)))
    found = tomllib.loads(as_toml(command, frozenset()))
    assert tuple(found.get("ask", ())) == tuple(texts)
    assert found.get("training", {}).get("lr", 2e-4) == lr
    assert found["lora"]["rank_pattern"] == {"q_proj": rank} and found["samples"]["mix"] == ["a=b.jsonl=0.5"]
