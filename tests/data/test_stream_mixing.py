"""Several files: how often each sample is seen, by share; long samples; and what is held out stays out."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import data
from minitune.config import Data
from minitune.data.account import Part
from minitune.data.batch import Batch
from minitune.data.corpus import Builder
from minitune.data.encode import Encoded
from minitune.data.holdout import split_off, streams
from minitune.data.ledger import PLACES
from minitune.data.stream import Stream
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


def part(documents: list[list[int]], share: float = 1, path: str = "a.jsonl") -> Part:
    builder = Builder(path, [2])
    builder.add(Encoded(f"{path}:{line}", array("i", ids), bytes([0] + [1] * (len(ids) - 1)))
                for line, ids in enumerate(documents, 1))
    return Part.whole(builder.finish(), share)


def seen(batches: list[Batch]) -> Counter[Ids]:
    """How often each document without filler (token 0) was seen."""
    found: Counter[Ids] = Counter()
    for batch in batches:
        found.update(tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist()))
    return Counter({ids: n for ids, n in found.items() if 0 not in ids})


def numbered(n: int, first: int = 1) -> list[list[int]]:
    return [[first + i, 7, 2] for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 3), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_no_sample_is_seen_twice_more_than_another(n: int, m: int, share: float, epochs: int, seed: int,
                                                   shuffle: bool) -> None:
    parts = [part(numbered(n), share), part(numbered(m, 100), 1, "b.jsonl")]
    stream = Stream(parts, 8, epochs=epochs, seed=seed, shuffle=shuffle)
    for number in range(1, epochs + 1):
        found = seen([batch for epoch in range(number) for batch in stream.epoch(epoch)])
        counts = [found[tuple(ids)] for ids in numbered(n)]
        assert sum(counts) == int(share * n * number + 0.5) and max(counts) - min(counts) <= 1
        assert all(found[tuple(ids)] == number for ids in numbered(m, 100))
    again = Stream(parts, 8, epochs=epochs, seed=seed, shuffle=shuffle)
    assert [batch.tokens.tolist() for batch in again] == [batch.tokens.tolist() for batch in stream]


def test_half_a_share_is_one_half_and_then_the_other() -> None:
    stream = Stream([part(numbered(10), 0.5)], 12, epochs=2, seed=1)
    first, second = (set(seen(list(stream.epoch(epoch)))) for epoch in (0, 1))
    assert len(first) == len(second) == 5 and not first & second
    other = Stream([part(numbered(10), 0.5)], 12, epochs=2, seed=2)
    assert set(seen(list(other.epoch(0)))) != first
    in_order = Stream([part(numbered(10), 0.5)], 12, epochs=2, shuffle=False)
    assert set(seen(list(in_order.epoch(0)))) == set(map(tuple, numbered(5)))


def test_another_file_does_not_change_what_is_drawn_of_the_first() -> None:
    alone = Stream([part(numbered(20), 0.5)], 12, seed=3)
    mixed = Stream([part(numbered(20), 0.5), part(numbered(4, 100), 2)], 12, seed=3)
    both = seen(list(mixed.epoch(0)))
    assert Counter({ids: n for ids, n in both.items() if ids[0] < 100}) == seen(list(alone.epoch(0)))
    assert all(both[tuple(ids)] == 2 for ids in numbered(4, 100))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(1, 12))
def test_splitting_loses_no_token_and_truncating_only_the_end(documents: list[list[int]], tokens: int) -> None:
    split = Stream([part(documents)], tokens, long="split", shuffle=False)
    pieces = [list(piece.ids) for piece in split.documents]
    assert all(0 < len(piece) <= tokens for piece in pieces)
    assert [number for piece in pieces for number in piece] == [number for ids in documents for number in ids]
    assert sum(seen(list(split)).values()) == sum(len(piece) > 1 for piece in pieces)      # one alone trains nothing
    assert split.n_trained == sum(len(piece) - 1 for piece in pieces) == sum(batch.n_trained for batch in split)
    cut = Stream([part(documents)], tokens, long="truncate", shuffle=False)
    assert [list(piece.ids) for piece in cut.documents] == [ids[:tokens] for ids in documents]
    if max(map(len, documents)) > tokens:
        with pytest.raises(InputError, match=r"a.jsonl:\d+: \d+ tokens do not fit into a row of .* truncate or drop"):
            Stream([part(documents)], tokens)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=20), min_size=1, max_size=9), st.integers(1, 12))
def test_dropping_leaves_out_what_is_too_long_and_counts_it(documents: list[list[int]], tokens: int) -> None:
    fits = [ids for ids in documents if len(ids) <= tokens]
    lines = [f"a.jsonl:{line}" for line, ids in enumerate(documents, 1) if len(ids) > tokens]
    if not fits:
        shortest, longest = min(map(len, documents)), max(map(len, documents))
        with pytest.raises(InputError, match=rf"a.jsonl: every sample is longer than {tokens} tokens, so none is left; "
                                             rf"raise tokens \(the shortest has {shortest}, the longest {longest}\)"):
            Stream([part(documents)], tokens, long="drop")
        return
    stream = Stream([part(documents)], tokens, long="drop", shuffle=False)
    assert [list(document.ids) for document in stream.documents] == fits
    total, lost = stream.ledger.total, sum(map(len, documents)) - sum(map(len, fits))
    assert (total.samples, total.documents, total.dropped) == (len(documents), len(fits), lost)
    notes = [note for note in stream.ledger.notes if "longer than" in note.text]
    assert [(note.count, note.places) for note in notes] == ([(len(lines), tuple(lines[:PLACES]))] if lines else [])
    if len(fits) > 1 and 1 in Counter(map(tuple, fits)).values():
        train, valid = split_off(stream, 1)
        assert train.ledger.total.dropped == lost and valid.ledger.total.dropped == 0
        assert train.ledger.total.tokens + valid.ledger.total.tokens == total.tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=30), st.floats(0.01, 0.9), st.integers(0, 3))
def test_a_split_keeps_duplicates_together_and_loses_nothing(values: list[int], amount: float, seed: int) -> None:
    half = len(values) // 2
    parts = [part([[v, 3, 2] for v in values[:half]]), part([[v, 3, 2] for v in values[half:]], 0.5, "b.jsonl")]
    whole = Stream(parts, 8, seed=seed)
    try:
        train, valid = split_off(whole, amount)
    except InputError as error:
        wanted = max(1, round(amount * len(values)))
        assert "cannot be held out" in str(error)
        assert wanted >= len(values) or min(Counter(values).values()) > wanted
        return
    left, right = (Counter(tuple(piece.ids) for piece in side.documents) for side in (train, valid))
    assert left and right and not left.keys() & right.keys()
    assert left + right == Counter((v, 3, 2) for v in values)
    assert valid.n_documents <= max(1, round(amount * len(values)))
    assert train.ledger.total.tokens + valid.ledger.total.tokens == whole.ledger.total.tokens
    assert train.ledger.total.samples + valid.ledger.total.samples == len(values)
    again = split_off(Stream(parts, 8, seed=seed), amount)[1]
    assert [list(piece.ids) for piece in again.documents] == [list(piece.ids) for piece in valid.documents]


def test_a_split_by_number() -> None:
    train, valid = split_off(Stream([part(numbered(20))], 12, epochs=3, seed=5), 4)
    assert (train.n_documents, valid.n_documents, train.epochs, valid.epochs) == (16, 4, 3, 1)
    for amount in (20, 21, 0.99):
        with pytest.raises(InputError, match=r"valid_split is .*; \d+ of 20 samples"):
            split_off(Stream([part(numbered(20))], 12), amount)
    with pytest.raises(InputError, match=r"\(1 different ones\) cannot be held out"):
        split_off(Stream([part([[5, 5, 2]] * 6)], 12), 2)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"question": text, "answer": "yes"}) for text in texts), encoding="utf-8")
    return path


def test_streams_by_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, extra = write(tmp_path / "a.jsonl", ["one", "two"]), write(tmp_path / "b.jsonl", ["three"])
    held = write(tmp_path / "c.jsonl", ["four", "two"])
    fields = ("prompt=question", "completion=answer")
    left, right = streams(train, tokenizer, Data(field_map=fields, mix=(f"{extra}=2",), valid=str(held)), tokens=64)
    assert left.n_documents == 4 and right is not None and right.n_documents == 2
    assert [str(note) for note in right.ledger.notes] == [f"1 sample: held out, but trained on as well ({held}:2)"]
    left, right = streams(train, tokenizer, Data(field_map=fields, valid_split=0.5), tokens=64)
    assert right is not None and left.n_documents == right.n_documents == 1
    assert streams(train, tokenizer, Data(field_map=fields), tokens=64, epochs=2)[1] is None


def test_data_that_trains_nothing_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Here, where a run is prepared; a Stream of it can be made, to look at."""
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(silent)}\n{json.dumps(silent)}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a.jsonl:2: nothing is trained here, nor in any other .*weight 1"):
        streams(path, tokenizer, Data(), tokens=64)
    assert data.stream(path, tokenizer, tokens=64).n_trained == 0
    more = tmp_path / "b.jsonl"
    more.write_text('{"text": "x"}', encoding="utf-8")
    assert streams(path, tokenizer, Data(mix=(f"{more}=1",)), tokens=64)[0].n_trained > 0


def test_refused_paths_and_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    for wrong, message in [
        ([], r"path is \[\]; give the path"), ({}, "path is {}; give the path"), ([path, path], "is given twice"),
        ({path: 0}, "share of .* is 0; it must be a positive number"), ({path: float("nan")}, "is nan"),
        ({path: -1}, "is -1"), ({path: True}, "is True"), ([3], r"path is \[3\]"),
        ([tmp_path / "none"], "no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            data.stream(wrong, tokenizer, tokens=64)
    with pytest.raises(InputError, match="long is 'cut'; it must be one of refuse, split, truncate"):
        data.stream(path, tokenizer, tokens=64, long="cut", field_map={"prompt": "question", "completion": "answer"})
    unused = tmp_path / "unused.jsonl"
    unused.write_text('{"prompt": "a", "completion": "b", "label": false}')
    with pytest.raises(InputError, match=r"unused.jsonl: none of its samples is used \(label is false: 1\), so there"):
        data.stream(unused, tokenizer, tokens=64)
    text = tmp_path / "b.jsonl"
    text.write_text('{"text": "abc"}')
    assert data.stream([unused, text], tokenizer, tokens=64).ledger.total.samples == 2
