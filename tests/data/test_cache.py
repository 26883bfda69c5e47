"""The cache: the same batches as without it, found by content alone, and never believed."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune import data
from minitune.data import cache, read
from minitune.data.stream import Stream
from minitune.data.tokenizer import Tokenizer, load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"text": "abc xyz " * 5}, {"prompt": "a", "completion": "b", "weight": 2}, {"text": "abc xyz " * 5},
    {"prompt": "q", "chosen": "good", "rejected": "bad"}, {"prompt": "q", "completion": "x", "label": False},
    {"inputs": [{"value": "open", "trainable": True}, {"value": "end", "trainable": False}]},
    {"prompt": "a", "completion": " "}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(small_spm: Path, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(shutil.copytree(small_spm, tmp_path / "tokenizer"))


def same(left: Stream, right: Stream) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
               and torch.equal(a.cu_seqlens, b.cu_seqlens) and a.weights is not None and b.weights is not None
               and torch.equal(a.weights, b.weights) for a, b in pairs) and left.ledger == right.ledger


def stream(path: Path, tokenizer: Tokenizer, **options: Any) -> Stream:
    return data.stream(path, tokenizer, **({"tokens": 64, "cache": True, "seed": 1, "epochs": 2} | options))


def refuse(*_: Any) -> None:
    raise AssertionError("the file was encoded again")


def test_batches_and_ledger_are_the_same(path: Path, tokenizer: Tokenizer, folder: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream(path, tokenizer, cache=False)
    assert not folder.exists()
    assert same(stream(path, tokenizer), plain) and len(list(folder.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(read, "encode", refuse)
        assert same(stream(path, tokenizer), plain)
        moved = path.rename(path.with_name("moved.jsonl"))
        found = stream(moved, tokenizer, tokens=70, long="split", seed=2)
        assert any(f"({moved}:3)" in str(note) for note in found.ledger.notes)
    assert same(stream(moved, tokenizer, long="split", tokens=7),
                stream(moved, tokenizer, long="split", tokens=7, cache=False))
    if os.name == "posix":
        assert next(folder.iterdir()).stat().st_mode & 0o077 == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=12), st.integers(2, 40),
       st.sampled_from(["split", "truncate"]))
def test_the_cache_changes_no_batch(small_spm: Path, rows: list[dict[str, Any]], tokens: int, long: str) -> None:
    if all(row.get("label") is False for row in rows):
        return
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITUNE_CACHE", name)
        path = Path(name) / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, [*rows, ROWS[1]])), encoding="utf-8")
        options = {"tokens": tokens, "long": long}
        tokenizer = load_tokenizer(small_spm)
        plain, first, second = (stream(path, tokenizer, cache=cached, **options) for cached in (False, True, True))
        assert same(plain, first) and same(plain, second)


def test_small_files_are_cached_only_when_asked(path: Path, tokenizer: Tokenizer, folder: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    stream(path, tokenizer, cache=None)
    assert not folder.exists()
    monkeypatch.setattr(cache, "MIN_FILE", 10)
    stream(path, tokenizer, cache=None)
    assert len(list(folder.iterdir())) == 1


def test_whatever_counts_makes_another_entry(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    found = {cache.entry(path, tokenizer, None)}
    found.add(cache.entry(path, tokenizer, {"prompt": "question"}))
    path.write_text(path.read_text() + " ")
    found.add(cache.entry(path, tokenizer, None))
    found.add(cache.entry(path.rename(path.with_suffix(".json")), tokenizer, None))
    path = path.with_suffix(".json")
    (tokenizer.folder / "chat_template.jinja").write_text("{{ messages }}")
    found.add(cache.entry(path, load_tokenizer(tokenizer.folder), None))
    tokenizer.eos_ids = (*tokenizer.eos_ids, 5)
    found.add(cache.entry(path, tokenizer, None))
    assert len(found) == 6 and None not in found


def test_the_tokenizer_counts_as_it_was_loaded(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Not as its files lie there now: else what it encodes would be found as the work of another."""
    old = cache.entry(path, tokenizer, None)
    config = tokenizer.folder / "tokenizer_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"added_tokens_decoder": {"400": {"content": "<z>"}}}))
    first = load_tokenizer(tokenizer.folder)
    config.write_text(json.dumps(told | {"added_tokens_decoder": {"400": {"content": "abc"}}}))
    assert cache.entry(path, tokenizer, None) == old
    second = load_tokenizer(tokenizer.folder)
    assert len({old, cache.entry(path, first, None), cache.entry(path, second, None)}) == 3
    stream(path, first)
    assert same(stream(path, second), stream(path, second, cache=False))
    assert not same(stream(path, second), stream(path, first))


@pytest.mark.parametrize(("text", "written"), [
    ("{{ strftime_now('%d %b %Y') }}", ["02 Jan 2026"]),
    ("{% if strftime_now is defined %}{{ strftime_now( '%R' ) }}{{ strftime_now('%d') }}{% endif %}", ["02", "09:30"]),
    ("{{ strftime_now(form) }}", None), ("{% set f = strftime_now %}", None)])
def test_what_a_template_writes_of_the_moment_counts(path: Path, tokenizer: Tokenizer, text: str,
                                                     written: list[str] | None) -> None:
    (tokenizer.folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    dated = load_tokenizer(tokenizer.folder)
    dated.now = datetime.datetime(2026, 1, 2, 9, 30, 5)
    assert cache._written(dated) == written and (cache.entry(path, dated, None) is None) == (written is None)


def test_what_a_killed_process_left_is_removed(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True)
    left, young = folder / ".a.partial", folder / ".b.partial"
    for each in (left, young):
        each.write_bytes(b"x")
    os.utime(left, (1, 1))
    stream(path, tokenizer)
    assert not left.exists() and young.exists()


def test_every_template_and_added_token_counts(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    home = tokenizer.folder
    days = [f"2026-01-0{day}" for day in (1, 2)]

    def entries() -> set[Path | None]:
        """One, or two where the day counts."""
        found = set()
        for day in days:
            tokenizer = load_tokenizer(home)
            tokenizer.now = datetime.datetime.fromisoformat(day)
            found.add(cache.entry(path, tokenizer, None))
        return found

    (home / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    found = entries()
    named = home / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    for text, size in (("{{ tools }}", 1), ("{{ tools }}.", 1), ("{{ strftime_now('%d') }}", 2)):
        named.write_text(text, encoding="utf-8")
        assert len(entries()) == size and not entries() & found
        found |= entries()
    shutil.rmtree(named.parent)
    (home / "chat_template.jinja").unlink()
    for text, size in (("j", 1), ("{{ strftime_now('%d') }}", 2)):
        (home / "chat_template.json").write_text(json.dumps({"chat_template": text}), encoding="utf-8")
        assert len(entries()) == size and not entries() & found
        found |= entries()
    for added in ((), ("<new>",), ("<new>", "<old>"), ("<old>", "<new>")):
        found.add(cache.entry(path, load_tokenizer(home, add=added), None))
    assert len(found) == 1 + 4 + 3 + 4 and None not in found


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "foreign", "head", "link", "folder"])
def test_a_broken_entry_is_made_anew(fault: str, path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    plain = stream(path, tokenizer)
    entry, = folder.iterdir()
    good = entry.read_bytes()
    other = path.with_name("other.jsonl")
    other.write_text('{"text": "entirely different"}')
    stream(other, tokenizer)
    foreign = next(each for each in folder.iterdir() if each != entry).read_bytes()
    shuffler = random.Random(0)
    for _ in range(20 if fault == "flip" else 1):
        raw = bytearray(good)
        raw[shuffler.randrange(len(raw))] ^= 1 << shuffler.randrange(8)
        entry.unlink()
        if fault == "folder":
            entry.mkdir()
        elif fault == "link":
            entry.symlink_to(path)
        else:
            entry.write_bytes({"flip": bytes(raw), "cut": good[:-1], "empty": b"", "foreign": foreign,
                               "head": good[:60]}[fault])
        assert same(stream(path, tokenizer), plain)
        if fault != "folder":
            assert entry.read_bytes() == good


def test_an_entry_with_a_true_checksum_is_still_examined(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    stream(path, tokenizer)
    entry, = folder.iterdir()
    corpus = cache.load(entry, str(path), tokenizer.vocab_size)
    assert corpus is not None
    assert cache.load(entry, str(path), 10) is None         # ids beyond the vocabulary
    for name, value in (("ids", -1), ("bounds", 3), ("weights", -1.0), ("trained", 1), ("n_trained", 9)):
        changed = getattr(corpus, name).clone()
        changed[0] = value
        cache.store(entry, type(corpus)(**{**vars(corpus), name: changed}))
        assert cache.load(entry, str(path), tokenizer.vocab_size) is None, name
    cache.store(entry, corpus)
    assert cache.load(entry, str(path), tokenizer.vocab_size) is not None


def test_no_cache_is_no_error(path: Path, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream(path, tokenizer, cache=False)
    folder.parent.write_text("a file stands where the folder should be")
    assert same(stream(path, tokenizer), plain)
    monkeypatch.setattr(cache, "folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert same(stream(path, tokenizer), plain)


def test_a_file_that_changes_while_it_is_read_is_not_cached(path: Path, tokenizer: Tokenizer, folder: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def append(*arguments: Any) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return encode(*arguments)

    encode = read.encode
    monkeypatch.setattr(read, "encode", append)
    stream(path, tokenizer)
    assert not folder.exists()


def test_the_least_recently_used_go_first(path: Path, tokenizer: Tokenizer, folder: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[Path] = []
    for place in range(3):
        path.write_text(json.dumps({"text": f"number {place}"}))
        stream(path, tokenizer)
        entries.append(max(set(folder.iterdir()) - set(entries)))
        os.utime(entries[-1], (place, place))
    monkeypatch.setattr(cache, "MAX_BYTES", 2 * entries[0].stat().st_size + 600)
    path.write_text(json.dumps({"text": "number 3"}))
    stream(path, tokenizer)
    assert set(folder.iterdir()) >= {entries[2]} and not {entries[0], entries[1]} & set(folder.iterdir())


def test_progress_is_told(path: Path, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr("minitune.data.encode.CHUNK_SAMPLES", 2)
    found = stream(path, tokenizer, cache=False, progress=lambda *progress: told.append(progress))
    assert [samples for _, samples, _ in told] == [2, 4, 6, 7] and told[-1][0] == str(path)
    assert told[-1][2] == sum(map(len, found.documents))
