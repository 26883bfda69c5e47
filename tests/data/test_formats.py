"""Sample formats: each one recognised by its fields, what of it is trained, what is unused; field maps; prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitune.data.fields import FORMATS
from minitune.data.formats import Prompt, Sample, Unused, prompts_of, to_sample, to_samples
from minitune.data.rows import read_rows
from minitune.data.segments import Segment
from minitune.errors import InputError


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


def sample(kind: str, **found: Any) -> Sample:
    """What is expected; ``texts``: [(text, trained), …] for segments as all formats but Gradient's have them."""
    texts = found.pop("texts", None)
    segments = None if texts is None else [Segment(text, trained, ends=trained) for text, trained in texts]
    return Sample("w", kind, **({"segments": segments, "messages": None, "tools": None, "weight": None} | found))


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
REJECTED = Unused("rejected answer", "r")
Q, A = user("q"), bot("a")
READ: list[tuple[dict[str, Any], Sample]] = [
    ({"text": "a", "id": 1, "source": None}, sample("text", texts=[("a", True)])),
    ({"text": "a", "images": [], "history": "", "tools": [], "system": ""}, sample("text", texts=[("a", True)])),
    ({"text": "a", "weight": 2, "prompt": None}, sample("text", texts=[("a", True)], weight=2.0)),
    ({"prompt": "q", "completion": "a"}, sample("prompt/completion", texts=[("q", False), ("a", True)])),
    ({"prompt": "", "completion": "a"}, sample("prompt/completion", texts=[("a", True)])),
    ({"prompt": [Q, A, Q], "completion": [A, Q, A], "tools": TOOLS},
     sample("prompt/completion", messages=[Q, A | {"weight": 0}, Q, A, Q, A], tools=TOOLS)),
    ({"prompt": "q", "completion": [A]}, sample("prompt/completion", messages=[Q, A])),
    ({"prompt": [Q], "completion": "a"}, sample("prompt/completion", messages=[Q, A])),
    ({"instruction": "i", "input": "x", "output": "a"}, sample("alpaca", messages=[user("i\n\nx"), A])),
    ({"instruction": "i", "input": "", "output": "a"}, sample("alpaca", messages=[user("i"), A])),
    ({"instruction": "i", "output": "a", "system": "s"},
     sample("alpaca", messages=[{"role": "system", "content": "s"}, user("i"), A])),
    ({"messages": [Q, A, Q, bot("b", weight=0), Q], "weight": 0.5},
     sample("openai chat", messages=[Q, A, Q, bot("b", weight=0), Q], weight=0.5)),
    ({"messages": [{"role": "developer", "content": "d"}, Q | {"weight": 0, "id": 3}, A | {"weight": 1.0, "name": "n"}],
      "parallel_tool_calls": False},
     sample("openai chat", messages=[{"role": "developer", "content": "d"}, Q, A | {"weight": 1, "name": "n"}])),
    ({"messages": [Q | {"content": [{"type": "text", "text": "q", "image_url": None}, {"type": "text", "text": "!"}]},
                   bot("")| {"content": None, "tool_calls": [CALL]},
                   {"role": "tool", "tool_call_id": "1", "content": "3", "tool_calls": None},
                   bot("a", tool_calls=[], reasoning_content="r")], "tools": json.dumps(TOOLS)},
     sample("openai chat", messages=[
         user("q!"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "content": "3", "tool_call_id": "1"}, bot("a", reasoning_content="r")], tools=TOOLS)),
    ({"messages": [Q, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                   {"role": "function", "name": "f", "content": "3"}, A], "functions": [TOOLS[0]["function"]]},
     sample("openai chat", messages=[Q, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                     {"role": "tool", "content": "3", "name": "f"}, A], tools=TOOLS)),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": None}],
      "system": "s", "tools": ""},
     sample("sharegpt", messages=[{"role": "system", "content": "s"}, Q, A])),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
                        {"from": "observation", "value": "3"}, {"from": "chatgpt", "value": "a", "weight": 0}]},
     sample("sharegpt", messages=[{"role": "system", "content": "s"}, Q,
                                  {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                  {"role": "tool", "content": "3"}, bot("a", weight=0)])),
    ({"conversations": [Q, A]}, sample("sharegpt", messages=[Q, A])),
    ({"inputs": "a", "multiplier": 0.5}, sample("gradient", texts=[("a", True)], weight=0.5)),
    ({"inputs": [{"value": "", "trainable": False}, {"value": "q", "trainable": False, "parse_special_tokens": None},
                 {"value": "a", "trainable": True}, {"value": "b", "trainable": True, "parse_special_tokens": True}]},
     sample("gradient", segments=[Segment("q", False), Segment("a", True),
                                  Segment("b", True, ends=True, parse_special=True)])),
    ({"prompt": "q", "chosen": "a", "rejected": "r", "score_chosen": 3},
     sample("preference", texts=[("q", False), ("a", True)], unused=REJECTED)),
    ({"prompt": [Q, A, Q], "chosen": [A], "rejected": [bot("r")]},
     sample("preference", messages=[Q, A | {"weight": 0}, Q, A], unused=REJECTED)),
    ({"prompt": "q", "chosen": [A], "rejected": "r"}, sample("preference", messages=[Q, A], unused=REJECTED)),
    ({"prompt": "q", "chosen": "a", "rejected": ""},
     sample("preference", texts=[("q", False), ("a", True)], unused=Unused("rejected answer", ""))),
    ({"chosen": [Q, bot("1"), Q, A], "rejected": [Q, bot("1"), Q, bot("r")], "tools": TOOLS},
     sample("preference", messages=[Q, bot("1", weight=0), Q, A], unused=REJECTED, tools=TOOLS)),
    ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, bot("r")]},
     sample("preference", messages=[Q, A], unused=REJECTED)),
    ({"chosen": [Q, A], "rejected": [Q, A]},
     sample("preference", messages=[Q, A], unused=Unused("rejected answer", "a"))),
    ({"chosen": [Q, A], "rejected": [user("other"), bot("r")]},
     sample("preference", messages=[Q, A], unused=Unused("rejected answer", "other\nr"))),
    ({"input": {"messages": [Q, A, Q], "tools": TOOLS, "parallel_tool_calls": True},
      "preferred_output": [A], "non_preferred_output": [bot("r")]},
     sample("openai preference", messages=[Q, A | {"weight": 0}, Q, A], tools=TOOLS, unused=REJECTED)),
    ({"prompt": "q", "completion": "a", "label": True}, sample("kto", texts=[("q", False), ("a", True)])),
    ({"prompt": "q", "completion": "a", "label": False}, sample("kto", unused=Unused("label is false", "q\na"))),
    ({"prompt": [Q], "completion": [bot("")], "label": False}, sample("kto", unused=Unused("label is false", "q"))),
    ({"prompt": [Q], "completion": [A], "label": True}, sample("kto", messages=[Q, A])),
]


@pytest.mark.parametrize(("row", "expected"), READ, ids=[json.dumps(row)[:60] for row, _ in READ])
def test_a_row_becomes_a_sample(row: dict[str, Any], expected: Sample) -> None:
    before = json.dumps(row)
    assert to_sample(row, "w") == expected
    assert json.dumps(row) == before, "the row itself must not change"


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"instruction": "i", "input": "x", "output": "a", "text": "Below is i, x"},
     {"instruction": "i", "input": "x", "output": "a"}),
    ({"conversations": [Q, A], "conversation_id": 3}, {"messages": [Q, A]}),
    ({"prompt": "q", "completion": "a", "completion_id": 3}, {"prompt": "q", "completion": "a"}),
    ({"prompt": "q", "completion": "a", "label": True, "labeler": 3}, {"prompt": "q", "completion": "a"}),
    ({"text": "a", "label": None}, {"text": "a"}),
    ({"inputs": [{"value": "q", "trainable": False}, {"value": "a", "trainable": True},
                 {"value": "", "trainable": False}]},
     {"inputs": [{"value": "q", "trainable": False}, {"value": "a", "trainable": True}]}),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "chosen": [Q, A],
      "rejected": [Q, bot("b")]}, {"chosen": [Q, A], "rejected": [Q, bot("b")]}),
]


@pytest.mark.parametrize(("row", "other"), SAME, ids=[json.dumps(row)[:60] for row, _ in SAME])
def test_rows_that_mean_the_same(row: dict[str, Any], other: dict[str, Any]) -> None:
    one, same = to_sample(row, "w"), to_sample(other, "w")
    assert (one.segments, one.messages, one.unused) == (same.segments, same.messages, same.unused)


def test_a_field_map_leaves_other_names_alone() -> None:
    assert to_sample({"text": "a", "height": 3}, "w", {"text": "text"}) == to_sample({"text": "a"}, "w")
    with pytest.raises(InputError, match="label is None; it must be true or false"):
        to_sample({"q": "a", "completion": "b", "label": None}, "w", {"prompt": "q"})
    with pytest.raises(InputError, match="the field 'label' is missing"):
        to_sample({"prompt": "a", "completion": "b", "good": None}, "w", {"label": "good"})
    assert to_sample({"prompt": "a", "label": None, "completion": "b"}, "w",
                     {"weight": "label", "prompt": "prompt"}).kind == "prompt/completion"


def test_every_format_is_among_them() -> None:
    assert {expected.kind for _, expected in READ} == set(FORMATS)


def test_which_format_a_row_is_in_does_not_depend_on_the_order_of_its_fields() -> None:
    for row, expected in READ:
        assert to_sample(dict(reversed(row.items())), "w") == expected


def test_the_fields_of_no_two_formats_can_be_complete_in_one_row() -> None:
    for one, form in FORMATS.items():
        for other, rival in FORMATS.items():
            both = set(form.required) | set(rival.required)
            assert one == other or not (form.fields >= both and rival.fields >= both)


MAPPED: list[tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "question", "completion": "answer"}, {"question": "q", "answer": "a", "text": "whole", "context": "c"},
     {"prompt": "q", "completion": "a"}),
    ({"prompt": "meta.question", "completion": "a"}, {"meta": {"question": "q"}, "a": "a"},
     {"prompt": "q", "completion": "a"}),
    ({"prompt": "a.b", "completion": "a.c"}, {"a.b": "q", "a": {"b": "wrong", "c": "a"}},
     {"prompt": "q", "completion": "a"}),
    ({"prompt": "question", "completion": "prompt"}, {"question": "q", "prompt": "a", "prompts": 1},
     {"prompt": "q", "completion": "a"}),
    ({"messages": "chat"}, {"chat": [Q, A], "messages": [], "prompt": "q", "tools": TOOLS},
     {"messages": [Q, A], "tools": TOOLS}),
    ({"messages": "messages"}, {"messages": [Q, A], "prompt": "q", "text": "q a"}, {"messages": [Q, A]}),
    ({"weight": "score"}, {"text": "a", "score": 3}, {"text": "a", "weight": 3}),
    ({"weight": "score"}, {"text": "a", "score": None}, {"text": "a"}),
    ({"instruction": "ask", "input": "more"}, {"ask": "i", "more": None, "output": "a", "weight": 2},
     {"instruction": "i", "output": "a", "weight": 2}),
    ({"completion": "answer"}, {"prompt": "q", "answer": "a", "label": True},
     {"prompt": "q", "completion": "a", "label": True}),
]


@pytest.mark.parametrize(("field_map", "row", "same_as"), MAPPED, ids=[json.dumps(row[0]) for row in MAPPED])
def test_a_field_map_reads_other_names(field_map: dict[str, str], row: dict[str, Any], same_as: dict[str, Any]) -> None:
    assert to_sample(row, "w", field_map) == to_sample(same_as, "w")


BAD_MAPS: list[tuple[Any, str]] = [
    ({"promt": "q"}, "field map: 'promt' is no field of a format; did you mean 'prompt'?"),
    ({"xyz": "q"}, "field map: 'xyz' is no field of a format; the fields are text, prompt, "),
    ({5: "q"}, "field map: 5 is no field"),
    ({"prompt": "q", "completion": "q"}, "'q' is given to prompt and completion"),
    ({"prompt": ""}, "field map: prompt is ''; give the name"),
    ({"prompt": 3}, "field map: prompt is 3; give the name"),
    ({"text": "a", "prompt": "b"}, "field map: prompt, text belong to different formats"),
    ({"prompt": "qestion"}, "w: the field 'qestion', which the field map reads as prompt, is missing; did you mean "
                            "'question'?"),
    ({"prompt": "meta.q"}, "w: the field 'meta.q', which the field map reads as prompt, is missing; it has 'question'"),
    ({"prompt": "question.q"}, "'question.q', which the field map reads as prompt, is missing"),
    ({"weight": "question", "text": "answer"}, "w: weight is 'q'"),
]


@pytest.mark.parametrize(("field_map", "message"), BAD_MAPS, ids=[str(field_map) for field_map, _ in BAD_MAPS])
def test_bad_field_maps(tmp_path: Path, field_map: Any, message: str) -> None:
    row = {"question": "q", "answer": "a"}
    with pytest.raises(InputError) as caught:
        list(to_samples([("w", row)], field_map))
    assert message in str(caught.value)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError):
        list(to_samples(read_rows(path), field_map))


def test_a_file_of_every_format_is_read_in_order(tmp_path: Path) -> None:
    lines = [row for row, _ in READ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=0), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        found = list(to_samples(read_rows(tmp_path / name)))
        assert [each.kind for each in found] == [expected.kind for _, expected in READ]
        for each, (_, expected) in zip(found, READ, strict=True):
            assert each == expected._replace(where=each.where)
        numbers = [int(each.where.rsplit(":", 1)[1]) for each in found]
        assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    (tmp_path / "b.txt").write_text("One.\n\nTwo.", encoding="utf-8")
    assert next(to_samples(read_rows(tmp_path / "b.txt"))).segments == [Segment("One.\n\nTwo.", True, ends=True)]


def test_parquet_rows_carry_nulls_for_what_a_message_has_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = [{"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                           {"role": "tool", "content": "3", "tool_call_id": "1"}, bot("a", weight=0)]},
             {"messages": [Q, A]}]
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(table), path)
    found = list(to_samples(read_rows(path)))
    assert [each.messages for each in found] == [to_sample(row, "w").messages for row in table]
    assert found[1].where == f"{path}: row 2"


PROMPTS: list[tuple[dict[str, Any], Prompt | None]] = [
    ({"text": "a"}, None),
    ({"prompt": "", "completion": "a"}, None),
    ({"prompt": "q", "completion": "a"}, Prompt("q", None)),
    ({"messages": [Q, A, user("r"), bot("b")], "tools": TOOLS}, Prompt(None, [Q], TOOLS)),
    ({"messages": [Q, bot("a", weight=0), user("r"), bot("b")]},
     Prompt(None, [Q, bot("a", weight=0), user("r")])),
    ({"messages": [Q, bot("a", weight=0)]}, None),
    ({"messages": [bot("hello"), Q]}, None),
    ({"instruction": "i", "output": "a"}, Prompt(None, [user("i")])),
    ({"inputs": [{"value": "q", "trainable": False}, {"value": "a", "trainable": True}]}, Prompt("q", None)),
    ({"inputs": [{"value": "q", "trainable": False}]}, None),
    ({"prompt": "q", "chosen": "a", "rejected": "r"}, Prompt("q", None)),
    ({"prompt": "q", "completion": "a", "label": False}, None),
]


def test_the_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row, _ in PROMPTS), encoding="utf-8")
    assert list(prompts_of(path)) == [prompt for _, prompt in PROMPTS if prompt]
    path.write_text(json.dumps({"question": "q", "answer": "a"}))
    assert list(prompts_of(path, {"prompt": "question", "completion": "answer"})) == [Prompt("q", None)]
