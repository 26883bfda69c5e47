"""The ledger: it closes on any data under every setting, agrees with the batches, and its notes name the lines."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune import data
from minitune.data.batch import Batch
from minitune.data.ledger import COLUMNS, Ledger, Note
from minitune.data.tokenizer import Tokenizer, load_tokenizer

words = st.text("abc xyz", min_size=1, max_size=40)
rows = st.one_of(
    st.fixed_dictionaries({"text": words}),
    st.fixed_dictionaries({"prompt": words, "completion": words}),
    st.fixed_dictionaries({"prompt": words, "completion": words, "label": st.booleans()}),
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    st.fixed_dictionaries({"inputs": st.lists(
        st.fixed_dictionaries({"value": words, "trainable": st.booleans()}), min_size=1, max_size=3)}))
files = st.lists(st.lists(rows, min_size=1, max_size=8), min_size=1, max_size=3)
shares = st.lists(st.sampled_from([0.3, 0.5, 1, 1.7, 2]), min_size=3, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


def write(folder: Path, contents: list[list[dict[str, Any]]]) -> list[Path]:
    paths = [folder / f"{place}.jsonl" for place in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return paths


def raw_tokens(row: dict[str, Any], tokenizer: Tokenizer) -> int:
    """The tokens of a row by hand: BOS, its texts each by itself, EOS after what is trained last, and unused text."""
    def size(text: str, continues: bool = False) -> int:
        return len(tokenizer.encode(text, bos=False, continues=continues))

    if "inputs" in row:
        texts, ends = [part["value"] for part in row["inputs"]], row["inputs"][-1]["trainable"]
    elif row.get("label") is False:
        return sum(len(tokenizer.encode(text, bos=False)) for text in ["\n".join((row["prompt"], row["completion"]))])
    else:
        texts = [row[name] for name in ("text", "prompt", "completion", "chosen") if name in row]
        ends = True
    return 1 + sum(size(text, place > 0) for place, text in enumerate(texts)) + ends + size(row.get("rejected", ""))


def documents_of(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        found.update(tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist()))
    return Counter({ids: n for ids, n in found.items() if set(ids) != {0}})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, shares, st.sampled_from(["split", "truncate", "refuse"]), st.integers(2, 30), st.integers(1, 3),
       st.booleans())
def test_every_token_is_accounted_for(tokenizer: Tokenizer, contents: list[list[dict[str, Any]]],
                                      mixing: list[float], long: str, tokens: int, epochs: int, shuffle: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), contents)
        kept = [row for content in contents for row in content if row.get("label") is not False]
        if not kept:
            return
        if long == "refuse":
            tokens += max(raw_tokens(row, tokenizer) for row in kept)
        stream = data.stream(dict(zip(paths, mixing, strict=False)), tokenizer, tokens=tokens, epochs=epochs,
                             shuffle=shuffle, long=long, cache=False)
    ledger = stream.ledger
    ledger.check()
    for source, content in zip(ledger.sources, contents, strict=True):
        unlabelled = [row for row in content if row.get("label") is not False]
        rejected = sum(len(tokenizer.encode(row["rejected"], bos=False)) for row in content if "rejected" in row)
        dropped = sum(n for reason, (_, n) in source.reasons.items() if reason == "label is false")
        assert source.tokens == sum(raw_tokens(row, tokenizer) for row in unlabelled) + dropped
        assert source.reasons.get("rejected answer", (0, 0))[1] == rejected
        assert source.samples == len(content)
        assert long == "truncate" or source.truncated == 0
    first = list(stream.epoch(0))
    epoch = ledger.epoch
    assert epoch.batches == len(first) and sum(batch.n_tokens for batch in first) == epoch.batches * tokens
    assert sum(batch.n_trained for batch in first) == epoch.trained == stream.n_trained
    assert sum(len(ids) * n for ids, n in documents_of(first).items()) == stream.n_tokens
    drawn = [batch for number in range(epochs) for batch in stream.epoch(number)]
    if all(share * epochs >= 1 for share in mixing) and set(mixing[:len(contents)]) == {1}:
        trained = sum(source.trained for source in ledger.sources)
        assert sum(batch.n_trained for batch in drawn) == epochs * trained
    json.dumps(ledger.as_dict())
    assert all(len(row) == len(COLUMNS) for row in ledger.rows())


def test_a_ledger_that_does_not_close_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ledger = data.stream(write(tmp_path, [[{"text": "abc"}]]), tokenizer, tokens=20, cache=False).ledger
    source = ledger.sources[0]
    with pytest.raises(RuntimeError, match="are accounted for"):
        replace(ledger, sources=(replace(source, masked=source.masked + 1),)).check()
    with pytest.raises(RuntimeError, match="1 batches of 20 tokens hold 19"):
        replace(ledger, epoch=replace(ledger.epoch, filler=ledger.epoch.filler - 1)).check()


def notes(ledger: Ledger) -> dict[str, str]:
    return {note.text: str(note) for note in ledger.notes}


def test_notes_name_the_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    silent = {"inputs": [{"value": "nothing here", "trainable": False}]}
    open_end = {"inputs": [{"value": "abc", "trainable": True}, {"value": "xyz", "trainable": False}]}
    path, = write(tmp_path, [[
        {"text": "abc"}, silent, open_end, {"text": "abc"}, {"prompt": "a", "completion": " \n "},
        {"prompt": "a", "chosen": "b", "rejected": "xx yy"}, *[{"text": "same"}] * 13]])
    found = [str(note) for note in data.stream(path, tokenizer, tokens=64, cache=False).ledger.notes]
    assert any(f"1 sample: nothing in them is trained: all labels are masked; remove them, or give an answer weight 1 "
               f"({path}:2)" in note for note in found)
    assert any(f"1 sample: no end-of-text token is trained, so they do not teach to stop ({path}:3)" in note
               for note in found)
    assert any(note.startswith("1 sample: their answer is blank") and f"({path}:5)" in note for note in found)
    assert any(note.startswith("13 samples: the same tokens as a sample before them") and f"({path}:4, 8, 9, " in
               note and "15, 16, …)" in note for note in found)
    assert any(note.startswith("1 sample: rejected answer (") for note in found)
    assert len(found) == 5
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    odd, = write(tmp_path, [[{"text": "abc"}, {"messages": talk}, {"text": "caf\ufffd"}]])
    found = [str(note) for note in data.stream(odd, tokenizer, tokens=64, cache=False).ledger.notes]
    assert any(note.startswith("1 sample: do not end with an answer") and f"({odd}:2)" in note for note in found)
    assert any(note.startswith("1 sample: hold U+FFFD or a null") and f"({odd}:3)" in note for note in found)
    clean, = write(tmp_path, [[{"text": "abc"}, {"text": "xyz"}]])
    assert data.stream(clean, tokenizer, tokens=64, cache=False).ledger.notes == ()


def test_notes_on_long_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, = write(tmp_path, [[{"text": "abc"}, {"text": "abc xyz " * 20}]])
    split = data.stream(path, tokenizer, tokens=16, long="split", cache=False).ledger
    length = len(tokenizer.encode("abc xyz " * 20, eos=True))
    borders = -(-length // 16) - 1
    assert split.sources[0].pieces == 2 + borders and split.sources[0].truncated == 0
    assert split.sources[0].masked == 2 + borders
    assert any(f"split, no piece sees the one before it, and {borders} targets are masked" in text
               and f"({path}:2)" in said for text, said in notes(split).items())
    cut = data.stream(path, tokenizer, tokens=16, long="truncate", cache=False).ledger
    assert cut.sources[0].truncated == length - 16 and cut.sources[0].pieces == 2
    assert any(text.endswith("the rest and its end-of-text token are lost") for text in notes(cut))


def test_a_share_that_leaves_samples_out_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, = write(tmp_path, [[{"text": f"number {i}"} for i in range(10)]])
    ledger = data.stream({path: 0.3}, tokenizer, tokens=64, epochs=2, cache=False).ledger
    (reason, (samples, tokens)), = ledger.sources[0].reasons.items()
    assert reason == "not drawn in 2 epochs, as the share 0.3 says"
    assert samples == 4 and tokens == ledger.sources[0].dropped > 0
    assert ledger.sources[0].documents == 6 and ledger.epoch.samples == 3
    assert data.stream({path: 0.3}, tokenizer, tokens=64, epochs=4, cache=False).ledger.sources[0].dropped == 0


def test_texts() -> None:
    assert str(Note("odd", 1, ("a:1",))) == "1 sample: odd (a:1)"
    assert str(Note("odd", 1200, ("a:1", "a:2"))) == "1,200 samples: odd (a:1, 2, …)"
    assert str(Note("odd", 4, ("a: row 1", "a: row 2", "b", "b"))) == "4 samples: odd (a: row 1, 2, b, b)"
