"""encode: each sample as if it were alone, unused texts counted, blank answers seen, chunks that lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitune.data import encode as module
from minitune.data.corpus import BLANK, OPEN, SPOILT
from minitune.data.encode import chunks, encode
from minitune.data.formats import Sample, to_sample
from minitune.data.tokenizer import Tokenizer, load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"text": "one two three"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    {"prompt": "a", "completion": " b", "weight": 2.5},
    {"prompt": "q", "chosen": "good", "rejected": "a bad answer"},
    {"prompt": "q", "completion": "wrong", "label": False},
    {"prompt": "q", "completion": "right", "label": True},
    {"prompt": "q", "completion": " \n"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0},
                  {"role": "user", "content": "z"}, {"role": "assistant", "content": "w"}]},
]


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


def samples() -> list[Sample]:
    return [to_sample(row, f"a.jsonl:{place + 1}") for place, row in enumerate(ROWS)]


def test_many_samples_are_encoded_as_one_by_one(tokenizer: Tokenizer) -> None:
    together = encode(samples(), tokenizer)
    assert [encode([sample], tokenizer)[0] for sample in samples()] == together
    assert [each.where for each in together] == [f"a.jsonl:{place + 1}" for place in range(len(ROWS))]
    assert [each.weight for each in together] == [None, None, 2.5, None, None, None, None, None]


def test_what_is_unused_is_counted_and_said(tokenizer: Tokenizer) -> None:
    found = encode(samples(), tokenizer)
    assert found[3].reason == "rejected answer" and found[3].ids
    assert found[3].n_dropped == len(tokenizer.encode("a bad answer", bos=False)) > 0
    assert not found[4].ids and found[4].reason == "label is false" and found[4].n_dropped > 0
    assert [each.n_dropped for each in found if not each.reason] == [0] * 6
    assert [place for place, each in enumerate(found) if each.flags & BLANK] == [6]


def test_a_message_of_weight_0_is_not_trained(tokenizer: Tokenizer) -> None:
    found = encode(samples(), tokenizer)[7]
    targets = [number for number, trained in zip(found.ids, found.trained, strict=True) if trained]
    assert tokenizer.decode(targets).strip() == "w" and targets[-1] == tokenizer.eos_id


def test_chunks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    many = samples() * 5
    for name, value in (("CHUNK_SAMPLES", 3), ("CHUNK_CHARACTERS", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            found = list(chunks(many))
            assert [sample for chunk in found for sample in chunk] == many and len(found) > 5
    assert [len(chunk) for chunk in chunks(many)] == [40]
    assert list(chunks([])) == []


@pytest.mark.parametrize(("row", "flags"), [
    ({"text": "a"}, 0), ({"prompt": "a", "completion": " "}, BLANK), ({"text": "a caf\ufffd"}, SPOILT),
    ({"prompt": "a\0", "completion": " "}, BLANK + SPOILT),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, 0),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "c"}]}, OPEN)])
def test_what_a_sample_tells_of_itself(row: dict[str, Any], flags: int, tokenizer: Tokenizer) -> None:
    assert encode([to_sample(row, "a:1")], tokenizer)[0].flags == flags
