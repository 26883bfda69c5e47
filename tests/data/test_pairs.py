"""Pairs of answers, for preference training: read whole, kept together in a row, split off and cached as one sample."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune import data
from minitune.config import Data
from minitune.data import cache, read
from minitune.data.account import overlap
from minitune.data.formats import Sample, to_sample
from minitune.data.holdout import split_off, streams
from minitune.data.stream import Stream
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError
from tests.data.test_formats import READ, A, Q, bot, user

SYSTEM = {"role": "system", "content": "s"}
LONGER = [bot("x"), Q, bot("r")]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"number {i} " * (1 + i % 3), "chosen": "x" * (1 + i % 7), "rejected": "y" * (1 + i % 5)}
    for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


def stream(rows: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> Stream:
    return data.stream(rows, tokenizer, **({"tokens": 64, "pairs": True} | options))


@pytest.mark.parametrize("row", [row for row, _ in READ if "rejected" in row or "preferred_output" in row],
                         ids=lambda row: json.dumps(row)[:60])
def test_the_chosen_side_is_what_the_row_gives_without_pairs(row: dict[str, Any]) -> None:
    alone = to_sample(row, "w")
    try:
        pair = to_sample(row, "w", pairs=True)
    except InputError as error:
        assert any(word in str(error) for word in ("rejected is empty", "write both alike", "do not begin alike"))
        return
    if pair.rejected is None:
        assert pair.unused is not None and pair.unused.reason == "chosen and rejected are the same"
        return
    assert pair[:6] == alone[:6] and pair.unused is None and pair.rejected.rejected is None
    assert pair.rejected.kind == pair.kind and pair.rejected.tools == pair.tools
    if pair.messages is not None and pair.rejected.messages is not None:
        assert pair.rejected.messages[:-1] == pair.messages[:-1] and pair.rejected.messages[-1] == bot("r")
    else:
        assert [each.text for each in pair.rejected.segments or ()] == ["q", "r"]


def test_a_text_answers_messages_as_a_turn_does() -> None:
    pair = to_sample({"prompt": [Q], "chosen": [A], "rejected": "r"}, "w", pairs=True)
    assert isinstance(pair.rejected, Sample) and pair.rejected.messages == [Q, bot("r")]


def test_the_chosen_conversation_may_stand_there_twice() -> None:
    """So do the rows of UltraFeedback."""
    row = {"prompt": Q["content"], "prompt_id": "1", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, bot("r")],
           "score_chosen": 9.0, "score_rejected": 1.0}
    pair = to_sample(row, "w", pairs=True)
    assert pair.messages == [Q, A] and pair.rejected is not None and pair.rejected.messages == [Q, bot("r")]
    assert to_sample(row, "w").messages == [Q, A]


def test_answers_of_several_turns() -> None:
    asked = [Q, bot("1", weight=0), user("2")]
    pair = to_sample({"chosen": [Q, bot("1"), user("2"), A], "rejected": [Q, bot("1"), user("2"), *LONGER]}, "w",
                     pairs=True)
    assert (pair.messages, pair.rejected and pair.rejected.messages) == ([*asked, A], [*asked, *LONGER])


REFUSED = [
    ({"prompt": "q", "completion": "a"}, r"^w: is a sample of the format prompt/completion, which has no rejected"),
    ({"messages": [Q, A]}, "which has no rejected answer to compare with; give chosen, rejected or input, preferred"),
    ({"prompt": "q", "completion": "a", "label": True}, "format kto, which has no rejected answer"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "^w: rejected is empty"),
    ({"prompt": "q", "chosen": [A], "rejected": "r"}, "one is text and the other messages; write both alike"),
    ({"prompt": "q", "chosen": "a", "rejected": [bot("r")]}, "one is text and the other messages; write both alike"),
    ({"chosen": [Q, A], "rejected": "r"}, "rejected is a text, and chosen a conversation; write both alike"),
    ({"chosen": [Q, A], "rejected": [Q]}, "rejected has no assistant turn"),
    ({"chosen": [Q, A], "rejected": [user("other"), bot("r")]}, "chosen and rejected do not begin alike"),
    ({"chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, user("other"), bot("r")]}, "do not begin alike"),
    ({"chosen": [Q, bot("1"), user("2"), A], "rejected": [Q, bot("1"), user("3"), A]}, "do not begin alike"),
    ({"prompt": "q", "messages": [Q, LONGER[0]], "chosen": [Q, A], "rejected": [Q, bot("r")]},
     "'prompt' and 'messages' belong to different formats"),
    ({"prompt": "q", "chosen": "a", "rejected": [{"role": "x", "content": "r"}]}, "rejected"),
    ({"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [Q]},
     "non_preferred_output has no assistant turn"),
]


@pytest.mark.parametrize(("row", "said"), REFUSED, ids=[json.dumps(row)[:60] for row, _ in REFUSED])
def test_what_is_no_pair(row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        to_sample(row, "w", pairs=True)


def sides(rows: list[dict[str, Any]], tokenizer: Tokenizer, name: str) -> list[list[int]]:
    """The ids of each row's prompt with one of its answers, as training on these alone reads them."""
    plain = [{"prompt": row["prompt"], "completion": row[name]} for row in rows]
    return [list(each.ids) for each in data.stream(plain, tokenizer, tokens=64).documents]


def test_a_pair_stands_together_in_a_row(tokenizer: Tokenizer) -> None:
    found = stream(ROWS, tokenizer, epochs=2, seed=1)
    chosen, rejected = (sides(ROWS, tokenizer, name) for name in ("chosen", "rejected"))
    assert found.pairs and found.n_pieces == len(ROWS) and len(found) > 4
    for epoch in range(2):
        seen: list[int] = []
        for batch in found.epoch(epoch):
            documents = [batch.tokens[a:b].tolist() for a, b in pairwise(batch.cu_seqlens.tolist())]
            assert len(batch.pieces) == len(documents) - (batch.n_filler > 0)
            assert batch.pieces[::2] == batch.pieces[1::2]
            for place, piece in enumerate(batch.pieces[::2]):
                assert documents[2 * place: 2 * place + 2] == [chosen[piece], rejected[piece]]
            seen += batch.pieces[::2]
            ends = batch.cu_seqlens[1:].long() - 1
            assert (batch.labels[ends] == -100).all() and batch.n_trained
        assert sorted(seen) == list(range(len(ROWS)))
    trained = sum(batch.n_trained for batch in found.epoch(0))
    alone = [[{"prompt": row["prompt"], "completion": row[name]} for row in ROWS] for name in ("chosen", "rejected")]
    assert trained == found.n_trained == sum(data.stream(rows, tokenizer, tokens=64).n_trained for rows in alone)
    again = data.pack(found.documents, 64)
    assert sum(batch.n_trained for batch in again) == trained
    assert sum(len(batch.pieces) for batch in again) == 2 * len(ROWS)


def test_trimmed_and_split_batches_keep_their_names(tokenizer: Tokenizer) -> None:
    (batch,) = stream(ROWS[:3], tokenizer, tokens=200)
    assert sorted(batch.pieces) == [0, 0, 1, 1, 2, 2] == sorted(batch.trimmed().pieces)
    assert [piece for part in batch.split(1) for piece in part.pieces] == list(batch.pieces)


def test_weights_are_of_both_answers(tokenizer: Tokenizer) -> None:
    (batch,) = stream([ROWS[0] | {"weight": 3.0}, ROWS[1]], tokenizer, tokens=100)
    assert batch.weights is not None
    each = [batch.weights[a:b].unique().tolist() for a, b in pairwise(batch.cu_seqlens.tolist())]
    wanted = {0: [3.0], 1: [1.0]}
    assert each == [wanted[piece] for piece in batch.pieces] + [[1.0]] * (batch.n_filler > 0)


def test_equal_answers_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    found = stream([*ROWS[:3], {"prompt": "q", "chosen": "a b", "rejected": "a b"}], tokenizer)
    assert found.n_documents == 3
    assert any("chosen and rejected are the same" in note.text for note in found.ledger.notes)
    with pytest.raises(InputError, match=r"none of its samples is used \(chosen and rejected are the same: 1\)"):
        stream([{"prompt": "q", "chosen": "a b", "rejected": "a b"}], tokenizer)


def test_a_pair_is_never_cut(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"row 3: 54 tokens do not fit into a row of 50; .* drop it .*: a pair"):
        stream(ROWS, tokenizer, tokens=50)
    for long in ("split", "truncate"):
        with pytest.raises(InputError, match=f"long is {long}, and a pair, .* is trained whole; refuse those"):
            stream(ROWS, tokenizer, long=long)


def test_answers_of_equal_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    tokenizer.chat_templates["default"] = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    try:
        found = stream([{"prompt": [Q], "chosen": [bot("a ")], "rejected": [bot("a")]},
                        {"prompt": [Q], "chosen": [bot("a ")], "rejected": [bot("b")]}], tokenizer)
    finally:
        del tokenizer.chat_templates["default"]
    assert found.n_documents == 1 and found.ledger.total.dropped > 0
    assert any("chosen and rejected are the same" in note.text for note in found.ledger.notes)


def test_notes_are_of_the_answer_that_they_are_about(tokenizer: Tokenizer) -> None:
    notes = stream([{"prompt": "q", "chosen": "fine", "rejected": " "}], tokenizer).ledger.notes
    assert not any("blank" in note.text for note in notes)
    notes = stream([{"prompt": "q", "chosen": " ", "rejected": "fine"}], tokenizer).ledger.notes
    assert any("their answer is blank" in note.text for note in notes)


def test_answers_to_one_prompt_stay_on_one_side(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"number {i}", "chosen": "x" * (1 + k % 2), "rejected": "y" * (1 + k)}
            for i in range(8) for k in range(4)]
    train, valid = split_off(stream(rows, tokenizer), 8)
    prompts = [{(int(each.where.rpartition(" ")[2]) - 1) // 4 for each in side.documents} for side in (train, valid)]
    assert len(prompts[0]) == 6 and len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    note = overlap(stream(rows, tokenizer).parts, stream(swapped, tokenizer).parts)
    assert note is not None and note.count == 4 and "answers to their prompts are trained on as well" in note.text


def test_a_pair_too_long_may_be_dropped(tokenizer: Tokenizer) -> None:
    whole, found = stream(ROWS, tokenizer), stream(ROWS, tokenizer, tokens=50, long="drop")
    fitting = [document for document in whole.documents if len(document) <= 50]
    assert 0 < len(fitting) < len(ROWS)
    assert [each.where for each in found.documents] == [each.where for each in fitting]
    assert all(batch.pieces[0::2] == batch.pieces[1::2] for batch in found)


def test_nothing_trained_on_one_side(tokenizer: Tokenizer) -> None:
    row = {"prompt": [Q], "chosen": [A], "rejected": [bot("r", weight=0)]}
    tokenizer.chat_templates["default"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match="row 1: nothing is trained of the rejected answer"):
        stream([row], tokenizer)


def test_pairs_are_held_out_whole_and_cached_as_such(tmp_path: Path, tokenizer: Tokenizer,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    train, valid = streams(path, tokenizer, Data(valid_split=6), tokens=64, pairs=True)
    assert valid is not None and valid.pairs and (train.n_documents, valid.n_documents) == (24, 6)
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    first = data.stream(path, tokenizer, tokens=64, cache=True, pairs=True)
    alone = data.stream(path, tokenizer, tokens=64, cache=True)
    assert not alone.pairs and len(list(cache.folder().glob("*.corpus"))) == 2
    monkeypatch.setattr(read, "_encoded", None)     # what is cached is not encoded again
    again = data.stream(path, tokenizer, tokens=64, cache=True, pairs=True)
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.cu_seqlens, b.cu_seqlens)
               for a, b in zip(first, again, strict=True))
    with pytest.raises(InputError, match="pairs is 'yes'; it must be True or False"):
        data.stream(path, tokenizer, tokens=64, pairs="yes")       # type: ignore[arg-type]
