"""Packing: every document once and whole, labels shifted, filler untrained, the ledger closed, and few rows."""

from __future__ import annotations

import random
import time
import tracemalloc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data import packing
from minitune.data.batch import IGNORED, Batch
from minitune.data.document import Document
from minitune.data.packing import best_fit, pack
from minitune.errors import InputError

documents = st.lists(
    st.lists(st.tuples(st.integers(1, 999), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=30)


def split(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (tokens, labels) of each document of a batch."""
    bounds = batch.cu_seqlens.tolist()
    return [(tuple(batch.tokens[a:b].tolist()), tuple(batch.labels[a:b].tolist()))
            for a, b in pairwise(bounds)]


def expected(pairs: list[tuple[int, bool]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A document's tokens and labels, written out as the contract says it."""
    ids = tuple(number for number, _ in pairs)
    labels = [IGNORED] * len(ids)
    for t in range(len(ids) - 1):
        if pairs[t + 1][1]:
            labels[t] = ids[t + 1]
    return ids, tuple(labels)


@settings(max_examples=80, deadline=None)
@given(documents, st.integers(20, 64))
def test_every_document_once_and_whole(samples: list[list[tuple[int, bool]]], tokens: int) -> None:
    made = [Document([number for number, _ in sample], [trained for _, trained in sample]) for sample in samples]
    batches = pack(made, tokens)
    found = []
    filler = 0
    for batch in batches:
        assert batch.n_tokens == tokens and batch.weights is None
        parts = split(batch)
        if set(parts[-1][0]) == {0}:  # ids of real documents here begin at 1
            ids, labels = parts.pop()
            assert set(labels) == {IGNORED}
            filler += len(ids)
        found += parts
        assert batch.positions.tolist() == [t for length in batch.documents.lengths for t in range(length)]
    assert sorted(found) == sorted(map(expected, samples))
    trained = sum(batch.n_trained for batch in batches)
    masked = sum(map(len, samples)) - trained
    assert trained == sum(document.n_trained for document in made)
    assert trained + masked + filler == tokens * len(batches)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_best_fit(lengths: list[int], tokens: int) -> None:
    rows = best_fit(lengths, tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= tokens for total in filled)
    long = sorted((n for n in lengths if 8 * n > tokens), reverse=True)
    assert sorted(filled) == sorted(slow_best_fit(long + [n for n in lengths if 8 * n <= tokens], tokens))


def slow_best_fit(lengths: list[int], tokens: int) -> list[int]:
    """Best fit in its plainest form, in the order given: how full each row gets."""
    rows: list[int] = []
    for length in lengths:
        fitting = [row for row in range(len(rows)) if rows[row] + length <= tokens]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


def test_packing_costs_what_the_documents_cost_whatever_tokens_is() -> None:
    tracemalloc.start()
    assert best_fit([2], 2**31 - 1) == [[0]]
    assert best_fit([2**31 - 1, 5, 2**31 - 6], 2**31 - 1) == [[0], [2, 1]]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_chats_leave_little_filler_and_packing_is_fast() -> None:
    shuffler = random.Random(0)
    lengths = [min(16384, max(8, int(shuffler.lognormvariate(6, 1)))) for _ in range(100_000)]
    start = time.process_time()
    rows = best_fit(lengths, 16384)
    assert time.process_time() - start < 2
    assert len(rows) * 16384 <= 1.001 * sum(lengths) + 16384


def test_documents_by_hand() -> None:
    by_list, = pack([[5, 6, 7]], 3)
    by_pair, = pack([([5, 6, 7], [6, 7, IGNORED])], 3)
    by_tensor, = pack([torch.tensor([5, 6, 7])], 3)
    for batch in (by_list, by_pair, by_tensor):
        assert batch.tokens.tolist() == [5, 6, 7] and batch.labels.tolist() == [6, 7, IGNORED]
        assert batch.cu_seqlens.tolist() == [0, 3] and batch.n_trained == 2
    masked, = pack([(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 7, IGNORED])), [9]], 6)
    assert masked.labels.tolist() == [IGNORED, 7] + [IGNORED] * 4
    assert masked.cu_seqlens.tolist() == [0, 3, 4, 6] and masked.trained.tolist() == [1]
    pair_of_ids, = pack([(5, 6)], 2)
    assert pair_of_ids.labels.tolist() == [6, IGNORED]
    assert pack([], 8) == []


def test_weights() -> None:
    plain, heavy = Document([1, 2], [0, 1]), Document([3, 4, 5], [0, 1, 1], weight=2.5)
    batch, = pack([plain, heavy], 7)
    assert batch.weights is not None and batch.weights.tolist() == [2.5, 2.5, 2.5, 1, 1, 1, 1]
    assert batch.tokens.tolist() == [3, 4, 5, 1, 2, 0, 0] and batch.labels.tolist()[:5] == [4, 5, IGNORED, 2, IGNORED]


def test_refused_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"train.jsonl:7: 9 tokens do not fit into a row of 8; raise tokens .* has 12"):
        pack([Document([1] * 9, [1] * 9, where="train.jsonl:7"), [1] * 12], 8)
    for documents, message in [
        ([[1], []], r"documents\[1\]: has no tokens"),
        ([[1, -1]], "-1 is no token id"),
        ([[1, 2**40]], "below"),
        ([b"abc"], r"documents\[0\]: must be a Document"),
        (["text"], r"documents\[0\]: must be a Document"),
        ([([1, 2], [1, 2])], "label 0 is 1; labels are already shifted, so it must be the next token, 2, or -100"),
        ([([1, 1], [1, 1])], r"label 1 is 1; .* \(there is none\)"),
        ([([1, 2], [2])], "2 ids but 1 labels"),
    ]:
        with pytest.raises(InputError, match=message):
            pack(documents, 8)
    for tokens in (0, "8", 2.5, None, True, 2**31):
        with pytest.raises(InputError, match=rf"packing: tokens is {tokens!r}; it must be a whole number from 1 to"):
            pack([[1]], tokens)
    monkeypatch.setattr(packing, "free_bytes", lambda device: 1_000_000)
    assert len(pack([[1]], 30_000)) == 1
    with pytest.raises(InputError, match=r"tokens is 31000; a row of so many takes 0.0 GB of memory, and 0.0 GB are"):
        pack([[1]], 31_000)
    for documents in (None, 3, "text"):
        with pytest.raises(InputError, match=f"pack: documents is {documents!r}; give a list"):
            pack(documents, 8)
    with pytest.raises(InputError, match="2 ids but 1 trained"):
        Document([1, 2], [1])
    with pytest.raises(InputError, match="weight is nan"):
        Document([1, 2], [0, 1], weight=float("nan"))


def test_rows_are_not_sorted_by_length() -> None:
    """A row of documents of one length would make a step of them."""
    lengths = [20, 30, 40, 50] * 200
    random.Random(0).shuffle(lengths)
    rows = best_fit(lengths, 1000)
    assert sum(len({lengths[index] for index in row}) >= 3 for row in rows) > 0.9 * len(rows)
