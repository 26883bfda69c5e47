"""stream: repeatable by seed, other orders in other epochs, a ledger that closes, and light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minitune import data
from minitune.data.batch import Batch
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    samples = [{"prompt": f"number {i} " * (1 + i % 3), "completion": "x" * (1 + i % 7)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    return path


def contents(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        found.update(tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(bounds))
    return Counter({ids: n for ids, n in found.items() if set(ids) != {0}})


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and torch.equal(a.cu_seqlens, b.cu_seqlens)
        for a, b in zip(left, right, strict=True))


def test_epochs_hold_every_document_in_an_order_of_their_own(path: Path, tokenizer: Tokenizer) -> None:
    stream = data.stream(path, tokenizer, tokens=100, epochs=2, seed=3)
    first, second = list(stream.epoch(0)), list(stream.epoch(1))
    assert len(first) == stream.count(1) and len(first) + len(second) == len(stream) == stream.count(2)
    assert same(list(stream), first + second)
    documents = Counter(tuple(document.ids) for document in stream.documents)
    assert contents(first) == contents(second) == documents and not same(first, second)
    assert same(list(data.stream(path, tokenizer, tokens=100, epochs=2, seed=3)), first + second)
    assert not same(list(data.stream(path, tokenizer, tokens=100, seed=4)), first)
    assert contents(list(data.pack(stream.documents, 100))) == documents
    assert torch.equal(next(stream).tokens, first[0].tokens) and torch.equal(next(stream).tokens, first[1].tokens)


def test_without_shuffling_epochs_are_equal_and_begin_with_the_file(path: Path, tokenizer: Tokenizer) -> None:
    stream = data.stream(path, tokenizer, tokens=100, shuffle=False)
    assert same(list(stream.epoch(0)), list(stream.epoch(1)))
    batch = next(iter(stream))
    assert batch.tokens.tolist()[:len(stream.documents[0])] == list(stream.documents[0].ids)


def test_the_ledger_closes(path: Path, tokenizer: Tokenizer) -> None:
    stream = data.stream(path, tokenizer, tokens=100)
    assert stream.n_documents == 40 and stream.n_tokens == sum(map(len, stream.documents))
    batches = list(stream)
    assert stream.n_trained == sum(batch.n_trained for batch in batches) > 0
    assert stream.n_trained + stream.n_masked + stream.n_filler == 100 * len(stream) == sum(b.n_tokens for b in batches)


def test_weights_reach_every_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two three"}\n{"text": "four five six", "weight": 3}', encoding="utf-8")
    stream = data.stream(path, tokenizer, tokens=max(len(tokenizer.encode(t, eos=True)) for t in
                                                     ("one two three", "four five six")), shuffle=False)
    light, heavy = list(stream)
    assert light.weights is not None and set(light.weights.tolist()) == {1.0}
    assert heavy.weights is not None and 3.0 in heavy.weights.tolist()


def test_bad_settings_and_long_samples(path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="seed is 'a'"):
        data.stream(path, tokenizer, tokens=100, seed="a")
    with pytest.raises(InputError, match="path is 3; give"):
        data.stream(3, tokenizer, tokens=100)
    for tokens, epochs, message in ((1, 1, "tokens is 1"), ("8", 1, "tokens is '8'"), (100, 0, "epochs is 0"),
                                    (100, 1.5, "epochs is 1.5"),
                                    (8, 1, rf"{path}:\d+: \d+ tokens do not fit into a row of 8; raise tokens")):
        with pytest.raises(InputError, match=message):
            data.stream(path, tokenizer, tokens=tokens, epochs=epochs)


def test_importing_data_loads_no_tokenizer_library() -> None:
    code = ("import sys, minitune.data\n"
            "heavy = {'sentencepiece', 'tokenizers', 'transformers', 'jinja2', 'pyarrow', 'rich'} & set(sys.modules)\n"
            "sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
