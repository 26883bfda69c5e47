"""Malformed samples: each of many kinds gives one error with file:line, the field, the value and what to do."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.fields import FORMATS
from minitune.data.formats import Sample, to_sample, to_samples
from minitune.data.rows import read_rows
from minitune.errors import InputError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [Q, A | changes]}


def part(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"value": "a", "trainable": True} | changes]}


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({}, "no known format; found the fields: none; accepted: text | prompt, completion | .*field map"),
    ({"question": "a", "answer": "b"}, "found the fields: 'question', 'answer'; accepted"),
    ({f"field{i}": i for i in range(9)}, "'field5', …; accepted"),
    ({"data": [{"text": "a"}], "version": 1}, "found the fields: 'data'.*; 'data' holds a list of objects: if these"),
    ({"rows": [{"a": 1}], "others": [{"a": 1}]}, "a field map reads others as these$"),
    ({"rows": [{"a": 1}, 2]}, "a field map reads others as these$"),
    ({"texts": "a"}, "unknown field 'texts'; did you mean 'text'"),
    ({"Text": "a"}, "did you mean 'text'"),
    ({"message": [Q, A]}, "did you mean 'messages'"),
    ({"conversation": []}, "did you mean 'conversations'"),
    ({"text": "a", "wieght": 2}, "did you mean 'weight'"),
    ({"text": "a", "prompt": "b"}, "'text' and 'prompt' belong to different formats; keep the fields of one"),
    ({"prompt": "a", "messages": []}, "'prompt' and 'messages' belong to different.* field map, as messages=messages"),
    ({"prompt": "a", "completion": "b", "chosen": "c"}, "'completion' and 'chosen' belong to different"),
    ({"instruction": "a", "input": "b", "text": "ab"}, "'instruction' and 'text' belong to different"),
    ({"prompt": "a", "completion": "b", "label": None}, "label is None; it must be true or false"),
    *(({"text": "a", name: 1}, f"'{name}' is not read beside 'text', and would change") for name in (
        "sample_weight", "completion_mask", "assistant_masks", "loss_mask", "labels", "masked")),
    *((turn(**{name: 0}), rf"messages\[1\] has the field '{name}', which is not read; write weight") for name in (
        "training", "train_detail", "training_detail", "mask", "masked", "loss_mask", "loss_weight", "is_trained")),
    ({"text": "a", "weight": 1e-31}, "weight is 1e-31; it must be a positive number below 1e30, at least 1e-30"),
    ({"text": "a", "label": 1}, "'text' and 'label' belong to different"),
    ({"prompt": "a"}, "'completion' is missing beside 'prompt'; prompt/completion rows have prompt, completion"),
    ({"completion": "a"}, "'prompt' is missing"),
    ({"prompt": "a", "completion": None}, "'completion' is missing beside 'prompt'.*; here 'completion' is null$"),
    ({"id": 1, "text": None}, "found the fields: 'id'; accepted.*as these; here 'text' is null$"),
    ({"chosen": None, "rejected": None}, "; here 'chosen', 'rejected' are null$"),
    ({"instruction": "a", "input": None, "response": "b"}, "'output' is missing .* as these: output=response$"),
    ({"promt": "a", "text": None}, "did you mean 'prompt'.*as that\\)$"),
    ({"question": "a", "system": None, "note": None}, "found the fields: 'question'; accepted.*as these$"),
    ({"input": "a", "output": "b"}, "'instruction' is missing beside 'input'.* a field map reads"),
    ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ({"prompt": "a", "completion": "b", "images": ["x"]}, "'images' is not read beside 'prompt', and would change"),
    ({"text": "a", "tools": [{}]}, "'tools' is not read beside 'text'"),
    ({"messages": [Q, A], "system": "s"}, "'system' is not read beside 'messages'"),
    ({"text": "a", "multiplier": 2}, "'multiplier' is not read beside 'text'"),
    ({"text": 5}, "text is 5; it must be a string"),
    ({"text": ["a"]}, r"text is \['a'\]; it must be a string"),
    ({"text": ""}, "text is empty, so there is nothing to train on"),
    ({"prompt": 1, "completion": "b"}, "prompt is 1; it must be a string"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": "a", "completion": {"x": 1}}, "completion is {'x': 1}; it must be a string"),
    ({"prompt": ["a"], "completion": "b"}, r"prompt\[0\] is 'a'; a turn must be"),
    ({"prompt": [Q], "completion": [Q]}, "completion has no assistant turn"),
    ({"prompt": [Q, A | {"weight": 1}], "completion": [A]}, r"prompt\[1\].weight is 1, but a prompt is not trained"),
    ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools belong to a conversation, but the sample is plain text"),
    ({"instruction": "", "output": "a"}, "instruction is empty"),
    ({"instruction": "a", "output": ""}, "output is empty"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input is 3; it must be a string"),
    ({"text": "a", "weight": 0}, "weight is 0; it must be a positive number"),
    ({"text": "a", "weight": -1.5}, "weight is -1.5"),
    ({"text": "a", "weight": True}, "weight is True"),
    ({"text": "a", "weight": "2"}, "weight is '2'"),
    ({"inputs": "a", "multiplier": 0}, "multiplier is 0; it must be a positive number"),
    ({"inputs": "a", "multiplier": 1, "weight": 1}, "weight and multiplier are given"),
    ({"messages": []}, r"messages is \[\]; it must be a list"),
    ({"messages": "hi"}, "messages is 'hi'"),
    ({"messages": ["hi"]}, r"messages\[0\] is 'hi'; a turn must be"),
    ({"messages": [Q]}, "messages has no assistant turn"),
    (turn(role="asistant"), r"messages\[1\].role is 'asistant'; did you mean 'assistant'\? accepted: system"),
    (turn(role=["x"]), r"messages\[1\].role is \['x'\]; accepted"),
    (turn(role=None), r"messages\[1\].role is None"),
    (turn(content=None), r'content is None; it must be a string \(only an .* may say nothing; an empty turn is ""\)'),
    (turn(content=5), r"messages\[1\].content is 5; it must be a string"),
    (turn(content=""), r"messages\[1\] says nothing; .* or have weight 0"),
    (turn(content=[]), r"messages\[1\] says nothing"),
    (turn(content=[{"type": "image_url", "image_url": {}}]), r"content\[0\] is of type 'image_url', and only text"),
    (turn(content=[{"type": "text"}]), r"content\[0\] is {'type': 'text'}; it must be"),
    (turn(content=["a"]), r"content\[0\] is 'a'; it must be"),
    (turn(weight=0.5), r"messages\[1\].weight is 0.5; a turn's weight is 0 \(not trained\) or 1"),
    (turn(weight=True), r"messages\[1\].weight is True"),
    ({"messages": [Q | {"weight": 1}, A]}, r"messages\[0\].weight is 1, but only an assistant's"),
    (turn(contnet="a"), "the unknown field 'contnet'; did you mean 'content'"),
    (turn(train=False), "the field 'train', which is not read; write weight, 0 or 1"),
    (turn(refusal="no"), "the field 'refusal', which is not read"),
    (turn(value="a"), r"messages\[1\] has from/value and role/content"),
    (turn(name=3), r"messages\[1\].name is 3; it must be a string"),
    (turn(tool_calls=[1]), r"messages\[1\].tool_calls is \[1\]; it must be a list of"),
    (turn(tool_calls="{"), "tool_calls is '{', which is not valid JSON: Expecting property name"),
    (turn(tool_calls=[CALL], function_call={"name": "f"}), "has tool_calls and function_call; keep one"),
    (turn(function_call={}), r"function_call is {}; it must be {\"name\": …"),
    ({"messages": [Q | {"tool_calls": [CALL]}, A]}, r"messages\[0\] has tool calls, but its role is 'user'"),
    ({"messages": [Q, A], "tools": "x"}, "tools is 'x', which is not valid JSON"),
    ({"messages": [Q, A], "tools": "[] []"}, r"tools is '\[\] \[\]', which is not one JSON value"),
    ({"messages": [Q, A], "tools": [1]}, r"tools is \[1\]; it must be a list of JSON objects"),
    ({"messages": [Q, A], "tools": [{}], "functions": [{}]}, "tools and functions are given; keep one"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "conversations has no assistant turn"),
    ({"conversations": [{"from": "martian", "value": "q"}]}, r"conversations\[0\].from is 'martian'; accepted"),
    ({"conversations": [{"value": "q"}]}, r"conversations\[0\].from is None"),
    ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value is None"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, r"\[0\].value is 'x', which is not valid JSON"),
    ({"conversations": [{"from": "system", "value": "s"}, Q, A], "system": "t"}, "system is given beside a system"),
    ({"inputs": 5}, "inputs is 5; it must be a string, or a list"),
    ({"inputs": []}, r"inputs is \[\]"),
    ({"inputs": ""}, "inputs is empty"),
    ({"inputs": ["a"]}, r"inputs\[0\] is 'a'; it must be"),
    (part(trainable=None), r"inputs\[0\].trainable is None; it must be true or false"),
    (part(trainable=1), r"inputs\[0\].trainable is 1; it must be true or false"),
    (part(parse_special_tokens="yes"), r"inputs\[0\].parse_special_tokens is 'yes'"),
    (part(parse_special_tokens=0), r"inputs\[0\].parse_special_tokens is 0; it must be true or false"),
    (part(value=""), r"inputs\[0\].value is ''; it must be a string, and not empty"),
    (part(value=None), r"inputs\[0\].value is None"),
    (part(trainabel=True), r"inputs\[0\] has the field 'trainabel', which is not read"),
    ({"inputs": [{"value": "", "trainable": False}]}, "inputs holds no text"),
    ({"chosen": "a", "rejected": "b"}, "'prompt' is missing beside 'chosen', which is no whole conversation"),
    ({"prompt": "p", "chosen": [Q, A], "rejected": [Q, A]}, "prompt is 'p', but chosen is a whole conversation that"),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "chosen is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": 5}, "rejected is 5; it must be a list"),
    ({"chosen": [Q, Q], "rejected": [Q, A]}, "chosen.* no assistant turn"),
    ({"input": "q", "preferred_output": [A], "non_preferred_output": [A]}, "input is 'q'; it must be {\"messages\""),
    ({"input": {"messages": [Q]}, "preferred_output": [], "non_preferred_output": [A]}, "preferred_output is \\[\\]"),
    ({"input": {"messages": [Q]}, "preferred_output": [Q], "non_preferred_output": [A]},
     "preferred_output has no assistant turn"),
    ({"input": {"messages": [Q], "tools": 3}, "preferred_output": [A], "non_preferred_output": [A]},
     "input: tools is 3"),
    ({"prompt": "p", "completion": "c", "label": 1}, "label is 1; it must be true"),
    ({"prompt": "p", "completion": "c", "label": "true"}, "label is 'true'; it must be true"),
    ({"prompt": "p", "completion": 3, "label": False}, "completion is 3; it must be"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED, ids=[json.dumps(row)[:60] for row, _ in MALFORMED])
def test_a_malformed_sample_names_file_line_and_what_to_do(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "ok"}\n\n' + json.dumps(row) + "\n", encoding="utf-8")
    found = []
    with pytest.raises(InputError, match=re.escape(f"{path}:3: ") + f".*{message}") as caught:
        for sample in to_samples(read_rows(path)):
            found.append(sample)
    assert [sample.where for sample in found] == [f"{path}:1"]
    said = str(caught.value).removeprefix(f"{path}:3: ")
    assert "\n" not in said and len(said) < 400


def test_huge_names_and_values_give_a_short_error_at_once() -> None:
    long = "text" * 1_000_000
    for row in ({long: 1}, {"text": "a", long: [long]}, {"text": {long: long}}, {"messages": [{long: long, **A}]},
                {"messages": [A | {"role": long}]}, {"messages": [A | {"content": [long]}]},
                {"inputs": [{long: 1, "value": "a", "trainable": True}]}, {"prompt": "a", "completion": [long]}):
        start = time.process_time()
        try:
            assert isinstance(to_sample(row, "w"), Sample)
        except InputError as error:
            assert len(str(error)) < 600
        assert time.process_time() - start < 2


NAMES = [*sorted(frozenset[str]().union(*(form.fields for form in FORMATS.values()))), "weight", "id", "texts"]
PIECES = [Q, A, turn(), {"from": "gpt", "value": "a"}, {"value": "a", "trainable": True}, [Q, A], [A], [Q], "a", "", [],
          {}, {"messages": [Q]}, True, False, 0, 1.5, None, '[{"name": "f"}]', CALL, {"type": "text", "text": "t"}]
TURN_NAMES = ["role", "content", "from", "value", "weight", "tool_calls", "function_call", "name", "trainable", "type"]
values = st.recursive(
    st.sampled_from(PIECES) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(TURN_NAMES + NAMES) | st.text(max_size=4), inner, max_size=3), max_leaves=8)
rows = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), values, max_size=5) | st.sampled_from(
    sorted(FORMATS)).flatmap(lambda kind: st.fixed_dictionaries(dict.fromkeys(FORMATS[kind].required, values)))


@settings(max_examples=200, deadline=None)
@given(row=rows)
def test_any_object_is_a_sample_or_one_error_that_names_it(row: dict[str, Any]) -> None:
    try:
        sample = to_sample(row, "file:7")
    except InputError as error:
        assert str(error).startswith("file:7: ") and "\n" not in str(error)
        return
    assert sample.where == "file:7" and sample.kind in FORMATS
    assert (sample.segments is None) or (sample.messages is None)
    if sample.segments is None and sample.messages is None:
        assert row["label"] is False and sample.unused
    assert all(isinstance(segment.text, str) and segment.text for segment in sample.segments or ())
    assert all(isinstance(message["content"], str) or message["tool_calls"] for message in sample.messages or ())
    assert sample.messages is None or any(message["role"] == "assistant" for message in sample.messages)
    assert sample.unused is None or isinstance(sample.unused.text, str)


@settings(max_examples=200, deadline=None)
@given(row=rows, field_map=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NAMES, "a.b", "id.content"]),
                                           max_size=3))
def test_any_field_map_gives_a_sample_or_one_error(row: dict[str, Any], field_map: dict[str, str]) -> None:
    try:
        sample, = to_samples([("file:7", row)], field_map)
        assert isinstance(sample, Sample)
    except InputError as error:
        assert str(error).startswith(("file:7: ", "field map: "))
