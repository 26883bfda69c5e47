"""Samples as ids: exactly what is trained, exact prefixes, no blank gained or lost, where EOS and BOS stand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data.document import Document
from minitune.data.encode import encode
from minitune.data.formats import prompts_of, to_sample
from minitune.data.segments import Segment, encode_segments
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError

CHAT = [{"role": "system", "content": "Be </s> terse."}, {"role": "user", "content": "  What?\n"},
        {"role": "assistant", "content": "That. <s>"}, {"role": "user", "content": ""},
        {"role": "assistant", "content": " 👍 </s>"}, {"role": "user", "content": "bye"}]


@pytest.fixture(scope="module", params=["sentencepiece", "llama 3", "qwen"])
def tokenizer(request: pytest.FixtureRequest, small_spm: Path, byte_level: Callable[..., Path]) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(small_spm)
    return load_tokenizer(byte_level(bos=request.param == "llama 3"))


def document_of(row: dict[str, Any], tokenizer: Tokenizer) -> Document:
    found = encode([to_sample(row, "w")], tokenizer)[0]
    return Document(found.ids, found.trained, found.weight, found.where)


def trained_runs(document: Document, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of trained tokens, control tokens shown."""
    runs: list[list[int]] = [[]]
    for number, trained in zip(document.ids, document.trained, strict=True):
        if trained:
            runs[-1].append(number)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special=False, continues=True) for run in runs if run]


def control(document: Document, tokenizer: Tokenizer) -> list[int]:
    return [number for number in document.ids if number in tokenizer.control_ids]


def head(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def test_text_is_trained_whole(tokenizer: Tokenizer) -> None:
    document = document_of({"text": " the dog </s>", "id": 7}, tokenizer)
    assert list(document.ids) == tokenizer.encode(" the dog </s>", eos=True)
    assert list(document.trained) == [0] + [1] * (len(document) - 1) and document.n_trained == len(document) - 1
    assert tokenizer.decode(document.ids) == " the dog </s>"
    assert control(document, tokenizer) == [*head(tokenizer), tokenizer.eos_id]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_the_prompt_is_an_exact_prefix(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = document_of({"prompt": prompt, "completion": completion}, tokenizer)
    asked = tokenizer.encode(prompt)
    assert list(document.ids[:len(asked)]) == asked and not any(document.trained[:len(asked)])
    assert all(document.trained[max(1, len(asked)):]) and document.ids[-1] == tokenizer.eos_id
    blank = " " if tokenizer.kind == "sentencepiece" else "▁"  # sentencepiece reads its blank's sign as a blank
    assert tokenizer.decode(document.ids) == (prompt + completion).replace("▁", blank)


@pytest.mark.parametrize(("prompt", "completion"), [("Q: why?\nA:", " Because"), ("Q: why?\nA: ", "Because"),
                                                    ("12", "34"), ("a\n", "\n    b"), ("", "the dog")])
def test_no_blank_is_gained_or_lost_at_the_boundary(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = document_of({"prompt": prompt, "completion": completion}, tokenizer)
    assert tokenizer.decode(document.ids) == prompt + completion
    if prompt:
        eos = tokenizer.token(tokenizer.require_eos())
        assert trained_runs(document, tokenizer) == [completion + eos]


def test_only_assistant_turns_are_trained_in_every_chat_format(tokenizer: Tokenizer) -> None:
    document = document_of({"messages": CHAT}, tokenizer)
    eos = tokenizer.token(tokenizer.require_eos())
    assert trained_runs(document, tokenizer) == ["That. <s>" + eos, " 👍 </s>" + eos]
    assert control(document, tokenizer) == [*head(tokenizer), tokenizer.eos_id, tokenizer.eos_id]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in CHAT]
    assert document_of({"conversations": turns}, tokenizer) == document
    assert document_of({"conversations": turns[1:], "system": CHAT[0]["content"]}, tokenizer) == document
    rejected = [*CHAT[:4], {"role": "assistant", "content": "r"}]
    for row in ({"prompt": CHAT[:4], "completion": CHAT[4:]}, {"chosen": CHAT, "rejected": rejected},
                {"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": rejected[4:]},
                {"input": {"messages": CHAT[:4]}, "preferred_output": CHAT[4:], "non_preferred_output": rejected[4:]},
                {"messages": [message | {"weight": int(place > 2)} if message["role"] == "assistant" else message
                              for place, message in enumerate(CHAT)]}):
        found = document_of(row, tokenizer)
        assert found.ids == document.ids and trained_runs(found, tokenizer) == [" 👍 </s>" + eos]


def test_alpaca_is_a_chat(tokenizer: Tokenizer) -> None:
    found = document_of({"instruction": "Add.", "input": "1 2", "output": "3"}, tokenizer)
    assert found == document_of({"messages": [{"role": "user", "content": "Add.\n\n1 2"},
                                              {"role": "assistant", "content": "3"}]}, tokenizer)


def test_gradient_trains_exactly_what_is_given_and_eos_behind_a_trained_end(tokenizer: Tokenizer) -> None:
    eos = tokenizer.token(tokenizer.require_eos())
    parts = [{"value": "Q: why?\nA:", "trainable": False}, {"value": " Because </s>", "trainable": True},
             {"value": "\nQ: so?", "trainable": False}, {"value": " Yes", "trainable": True}]
    document = document_of({"inputs": parts}, tokenizer)
    assert trained_runs(document, tokenizer) == [" Because </s>", " Yes" + eos]
    assert tokenizer.decode(document.ids) == "".join(str(part["value"]) for part in parts)
    assert control(document, tokenizer) == [*head(tokenizer), tokenizer.eos_id]
    untrained_end = document_of({"inputs": parts[:3], "multiplier": 2}, tokenizer)
    assert control(untrained_end, tokenizer) == head(tokenizer) and untrained_end.weight == 2
    assert document_of({"inputs": "the dog"}, tokenizer) == document_of({"text": "the dog"}, tokenizer)


def test_control_tokens_are_read_only_where_a_segment_says_so(tokenizer: Tokenizer) -> None:
    eos, bos = tokenizer.require_eos(), tokenizer.bos_id
    spelled = "Yes" + tokenizer.token(eos)
    for parse, expected in ((True, [eos]), (False, [eos])):     # one EOS at the end either way: its own, or ours
        document = document_of({"inputs": [{"value": spelled, "trainable": True, "parse_special_tokens": parse}]},
                               tokenizer)
        assert control(document, tokenizer) == [*head(tokenizer), *expected] and document.ids[-1] == eos
        assert tokenizer.decode(document.ids) == ("Yes" if parse else spelled)
    if bos is not None and tokenizer.adds_bos:
        text = tokenizer.token(bos) + "the dog"
        once = encode_segments([[Segment(text, True, ends=True, parse_special=True)]], tokenizer)[0]
        assert once[0].count(bos) == 1 and once[0][0] == bos
        assert encode_segments([[Segment(text, True, ends=True)]], tokenizer)[0][0].count(bos) == 1


def test_many_samples_are_encoded_as_one_by_one(tokenizer: Tokenizer) -> None:
    samples = [[Segment(f"a {i}", i % 3 == 0, ends=i % 3 == 0, parse_special=i % 2 == 0),
                Segment(" b", True, ends=i % 4 > 0, parse_special=i % 5 == 0)]
               for i in range(20)]
    samples.insert(3, [])
    assert encode_segments(samples, tokenizer) == [encode_segments([sample], tokenizer)[0] for sample in samples]


def test_a_prompt_is_what_its_document_begins_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "Q:", "completion": " A"}, {"messages": CHAT},
            {"inputs": [{"value": "Q: ", "trainable": False}, {"value": "A", "trainable": True}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for row, prompt in zip(rows, prompts_of(path), strict=True):
        ids = (tokenizer.encode(prompt.text) if prompt.text is not None else
               tokenizer.encode_chat(prompt.messages, prompt.tools, add_generation_prompt=True)[0])
        document = document_of(row, tokenizer)
        assert list(document.ids[:len(ids)]) == ids and document.trained[len(ids)]
        assert not any(document.trained[:len(ids)])


def test_a_tokenizer_without_eos_cannot_end_an_answer(byte_level: Callable[..., Path]) -> None:
    nothing = load_tokenizer(byte_level(tokenizer_config={}))
    with pytest.raises(InputError, match="no end-of-text token"):
        document_of({"text": "a"}, nothing)
    ids, trained = encode_segments([[Segment("a", True)]], nothing)[0]
    assert ids and all(trained)
