"""Sample formats and the plain template: exactly what is trained, exact prefixes, and which fields are refused."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data.chat import encode_chat_plain
from minitune.data.document import Document
from minitune.data.formats import prompts_of, read_documents, to_document
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


def trained_runs(document: Document, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of trained tokens, control tokens shown."""
    runs: list[list[int]] = [[]]
    for number, trained in zip(document.ids, document.trained, strict=True):
        if trained:
            runs[-1].append(number)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special=False, continues=True) for run in runs if run]


def head(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def test_text_is_trained_whole(tokenizer: Tokenizer) -> None:
    document = to_document({"text": " the dog </s>", "id": 7}, tokenizer)
    assert list(document.ids) == tokenizer.encode(" the dog </s>", eos=True)
    assert list(document.trained) == [0] + [1] * (len(document) - 1) and document.n_trained == len(document) - 1
    assert tokenizer.decode(document.ids) == " the dog </s>"
    assert [number for number in document.ids[1:] if number in tokenizer.control_ids] == [tokenizer.eos_id]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_the_prompt_is_an_exact_prefix(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = to_document({"prompt": prompt, "completion": completion}, tokenizer)
    asked = tokenizer.encode(prompt)
    assert list(document.ids[:len(asked)]) == asked and not any(document.trained[:len(asked)])
    assert all(document.trained[max(1, len(asked)):]) and document.ids[-1] == tokenizer.eos_id
    blank = " " if tokenizer.kind == "sentencepiece" else "▁"  # sentencepiece reads its blank's sign as a blank
    assert tokenizer.decode(document.ids) == (prompt + completion).replace("▁", blank)


@pytest.mark.parametrize(("prompt", "completion"), [("Q: why?\nA:", " Because"), ("Q: why?\nA: ", "Because"),
                                                    ("12", "34"), ("a\n", "\n    b"), ("", "the dog")])
def test_no_blank_is_gained_or_lost_at_the_boundary(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    document = to_document({"prompt": prompt, "completion": completion}, tokenizer)
    assert tokenizer.decode(document.ids) == prompt + completion
    if prompt:
        eos = tokenizer.token(tokenizer.require_eos())
        assert trained_runs(document, tokenizer) == [completion + eos]


def test_only_assistant_turns_are_trained(tokenizer: Tokenizer) -> None:
    document = to_document({"messages": CHAT}, tokenizer)
    eos = tokenizer.token(tokenizer.require_eos())
    assert trained_runs(document, tokenizer) == ["That. <s>" + eos, " 👍 </s>" + eos]
    assert tokenizer.decode(document.ids) == (
        "### System:\nBe </s> terse.\n\n### User:\n  What?\n\n\n### Assistant:\nThat. <s>\n\n### User:\n"
        "\n\n### Assistant:\n 👍 </s>\n\n### User:\nbye")
    control = [number for number in document.ids if number in tokenizer.control_ids]
    assert control == [*head(tokenizer), tokenizer.eos_id, tokenizer.eos_id]


def test_a_chat_prompt_is_an_exact_prefix_of_its_training_sample(tokenizer: Tokenizer) -> None:
    whole = to_document({"messages": CHAT}, tokenizer)
    for turns in (2, 4):
        ids, trained = encode_chat_plain(CHAT[:turns], tokenizer, add_generation_prompt=True)
        assert list(whole.ids[:len(ids)]) == ids and whole.trained[len(ids)] and not trained[-1]
    with pytest.raises(InputError, match="chat: messages is 'hi'"):
        encode_chat_plain("hi", tokenizer)  # type: ignore[arg-type]


def test_weight_and_null_fields(tokenizer: Tokenizer) -> None:
    document = to_document({"text": "a b", "prompt": None, "messages": None, "weight": 2, "category": [1]}, tokenizer)
    assert document.weight == 2.0 and to_document({"text": "a b"}, tokenizer).weight is None


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | changes]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, r"no known format; accepted: {\"text\"}, .* found the fields: none"),
    ({"question": "a", "answer": "b"}, "found the fields: 'question', 'answer'"),
    ({"texts": "a"}, "unknown field 'texts'; did you mean 'text'"),
    ({"Text": "a"}, "did you mean 'text'"),
    ({"text": "a", "wieght": 2}, "did you mean 'weight'"),
    ({"text": "a", "prompt": "b"}, "'text' and 'prompt' belong to different formats"),
    ({"prompt": "a", "messages": []}, "'prompt' and 'messages' belong to different"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'completion' is missing beside 'prompt'"),
    ({"completion": "a"}, "'prompt' is missing"),
    ({"prompt": "a", "completion": "b", "label": False}, "'label' is not read beside 'prompt'"),
    (turn() | {"tools": []}, "'tools' is not read"),
    ({"text": 5}, "text is 5; it must be a string"),
    ({"text": ""}, "text is empty"),
    ({"prompt": ["a"], "completion": "b"}, r"prompt is \['a'\]; it must be"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": "a", "completion": {"x": 1}}, "completion is {'x': 1}; it must be"),
    ({"text": "a", "weight": 0}, "weight is 0"),
    ({"text": "a", "weight": True}, "weight is True"),
    ({"text": "a", "weight": "2"}, "weight is '2'"),
    ({"messages": []}, r"messages is \[\]"),
    ({"messages": "hi"}, "messages is 'hi'"),
    ({"messages": 5}, "messages is 5"),
    ({"messages": ["hi"]}, r"messages\[0\] is 'hi'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    (turn(role="asistant"), r"messages\[1\].role is 'asistant'; accepted: system, user, assistant"),
    (turn(role=["x"]), r"messages\[1\].role is \['x'\]"),
    (turn(role="system"), "a system turn must be the first"),
    (turn(content=None), r"messages\[1\].content is None; it must be a string"),
    (turn(content=[{"type": "text"}]), r"messages\[1\].content is \["),
    (turn(content=""), r"messages\[1\].content is empty"),
    (turn(tool_calls=[1]), "'tool_calls', which is not read; accepted: role, content"),
]


@pytest.mark.parametrize(("sample", "message"), REFUSED, ids=[json.dumps(sample)[:50] for sample, _ in REFUSED])
def test_refused_samples_name_file_and_line(
        tmp_path: Path, small_spm: Path, sample: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "ok"}\n\n' + json.dumps(sample) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:3") + f".*{message}"):
        list(read_documents(path, load_tokenizer(small_spm)))


def test_the_prompts_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [{"text": "a b"}, {"prompt": "Q:", "completion": " A"}, {"messages": CHAT}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    prompts = list(prompts_of(path))
    assert prompts[0] == "Q:" and prompts[1].endswith("### User:\n  What?\n\n\n### Assistant:\n") and len(prompts) == 2
    for prompt, sample in zip(prompts, samples[1:], strict=True):
        ids = tokenizer.encode(prompt)
        assert list(to_document(sample, tokenizer).ids[:len(ids)]) == ids


def test_a_file_is_read_in_order_and_in_chunks(
        tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitune.data.formats._CHUNK_SAMPLES", 3)
    samples = [{"text": f"line {i}"} if i % 2 else {"prompt": f"line {i}", "completion": " x"} for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, samples)), encoding="utf-8")
    found = list(read_documents(path, tokenizer))
    assert [document.where for document in found] == [f"{path}:{1 + 2 * i}" for i in range(10)]
    assert found == [to_document(sample, tokenizer, document.where)
                     for sample, document in zip(samples, found, strict=True)]


def test_the_plain_template_is_announced_where_the_tokenizer_has_its_own(
        tmp_path: Path, byte_level: Callable[..., Path]) -> None:
    own = load_tokenizer(byte_level(tokenizer_config={"eos_token": "<|end|>", "chat_template": "{{ messages }}"}))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(turn()) + "\n" + json.dumps(turn()), encoding="utf-8")
    with pytest.warns(UserWarning, match="its own chat template is not used") as caught:
        assert len(list(read_documents(path, own))) == 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_document({"text": "a b"}, own) and to_document(turn(), load_tokenizer(byte_level()))
    nothing = load_tokenizer(byte_level(tokenizer_config={}))
    with pytest.raises(InputError, match="no end-of-text token"):
        to_document({"text": "a"}, nothing)
