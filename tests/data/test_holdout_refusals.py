"""Streams in which nothing would be trained, though their files have something to train on, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitune.config import Data
from minitune.data.holdout import streams
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_answers_that_are_all_cut_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "word " * 300, "completion": "yes"}] * 3)
    with pytest.raises(InputError, match=r"a.jsonl: long is truncate, and what would be trained is cut off"):
        streams(path, tokenizer, Data(long="truncate"), tokens=64)
    good = write(tmp_path / "b.jsonl", [{"text": "one"}])
    with pytest.raises(InputError, match=r"a.jsonl: long is truncate.* to measure the validation loss on"):
        streams(good, tokenizer, Data(long="truncate", valid=str(path)), tokens=64)
    assert streams(path, tokenizer, Data(long="split"), tokens=64)[0].n_trained


def test_shares_that_draw_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"number {i}"} for i in range(3)])
    settings = Data(mix=(f"{path}=0.1",))
    with pytest.raises(InputError, match=r"the shares draw no sample in 1 epoch, so there is nothing to train on"):
        streams(path, tokenizer, settings, tokens=64)
    assert len(streams(path, tokenizer, settings, tokens=64, epochs=5)[0])


def test_a_split_that_takes_all_that_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [
        {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", "weight": int(i == 0)}]}
        for i in range(8)])
    uses = set()
    for seed in range(12):      # the one sample that is trained is on one side, so the other has nothing
        with pytest.raises(InputError, match="no sample that is drawn has anything trained") as caught:
            streams(path, tokenizer, Data(valid_split=4), tokens=64, seed=seed)
        uses.add("to train on" in str(caught.value))
    assert uses == {True, False}
