"""The corpus: cleaning, de-duplication, and a held-out part that nothing trained on overlaps."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.files import EXAMPLES, records


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("corpus", EXAMPLES / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["corpus"]


def _many(corpus, count: int = 3000):
    return [corpus.Document(f"lib.f{i % 700}", "function", f"Return the value number {i} of the list.\n\nMore of {i}.")
            for i in range(count)]


def test_clean_resolves_markup_and_drops_tables(corpus) -> None:
    text = """Return :class:`~torch.Tensor` of ``x``\u2019s :ref:`shape <shape-doc>`.

    .. note:: It is `new`_.

    .. math:: x = y

    | 1.0 | 2.0 | 3.0 |
    """
    assert corpus.clean(text) == "Return torch.Tensor of x's shape.\n\nNote: It is new."


def test_split_has_no_overlap_and_holds_out_the_expected_share(corpus) -> None:
    found = _many(corpus)
    train, held = corpus.split(found)
    assert not set(train) & set(held)
    assert len(train) + len(held) == 2 * len(found)
    share = len(held) / (2 * len(found))
    assert 0.4 / corpus.HELD_OUT_ONE_IN < share < 2 / corpus.HELD_OUT_ONE_IN


def test_a_document_and_its_question_fall_on_the_same_side(corpus) -> None:
    held = next(document for document in _many(corpus) if document.held_out)
    train, out = corpus.split([held])
    assert train == [] and len(out) == 2
    assert out[1] == f"Question: What does {held.name} do?\nAnswer: {held.body.split(chr(10))[0]}"


def test_a_text_that_is_trained_is_never_held_out(corpus) -> None:
    """Two bodies may share a first paragraph, hence a question; one of them is held out, the other is not."""
    held = next(document for document in _many(corpus) if document.held_out)
    twin = next(document for i in range(100)
                if not (document := corpus.Document(held.name, "function", f"{held.body} {i}")).held_out)
    train, out = corpus.split([held, twin])
    assert held.question() == twin.question() and twin.question() in train and twin.question() not in out


def test_pieces_lose_nothing_and_stay_short(corpus) -> None:
    body = "\n\n".join(f"Paragraph {i} " + "word " * (i % 60) + "ends." for i in range(100))
    pieces = corpus.pieces(body)
    assert "\n\n".join(pieces) == body
    assert len(pieces) > 3 and max(map(len, pieces)) <= corpus.PIECE_CHARS


def test_files_of_other_copyright_holders_are_left_out(corpus, tmp_path) -> None:
    ours = '"""Ours."""\n# Copyright (c) Python Software Foundation\ndef f():\n    """Do it."""\n'
    (tmp_path / "ours.py").write_text(ours)
    (tmp_path / "theirs.py").write_text('"""Theirs."""\n# Copyright (c) 2001 Somebody\n')
    (tmp_path / "broken.py").write_text("def (")
    assert list(corpus._folder(tmp_path, "", set(), "Python Software Foundation")) == [
        ("ours", "module", "Ours."), ("ours.f", "function", "Do it.")]


def test_the_shipped_held_out_texts_are_held_out_and_the_replay_is_not(corpus) -> None:
    held = {record["text"] for record in records(EXAMPLES / "heldout.jsonl")}
    assert 30_000 <= sum(map(len, held)) <= 60_000
    replay = {record["text"] for record in records(EXAMPLES / "replay.jsonl")}
    assert replay and not held & replay
    prose = {line for text in held for line in text.split("\n") if len(line) > 60}
    assert not prose & {line for text in replay for line in text.split("\n")}
