"""Conversations: what is accepted, what a template may not leave out, weights, and the plain template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitune.data.chat import check_messages, encode_conversations
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError

Make = Callable[..., Path]
CHATML = ("{% for m in messages %}{{ '<|begin|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}")
USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That it is."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.fixture
def made(byte_level: Make) -> Callable[[str | None], Tokenizer]:
    def make(source: str | None) -> Tokenizer:
        return load_tokenizer(byte_level(bos=True, tokenizer_config={
            "bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": source}))
    return make


def said(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> str:
    return tokenizer.decode([number for number, flag in zip(ids, trained, strict=True) if flag], skip_special=False)


REFUSED: list[tuple[Any, str]] = [
    ([], r"chat: messages is \[\]"), ("hi", "messages is 'hi'"), (5, "messages is 5"),
    (["hi"], r"messages\[0\] is 'hi'"),
    ([{**USER, "role": "asistant"}], r"messages\[0\].role is 'asistant'; accepted: system, developer, user"),
    ([{**USER, "role": ["x"]}], r"role is \['x'\]"), ([{"content": "x"}], "role is None"),
    ([{"role": "user"}], "content is None; it must be a string"), ([{**USER, "content": 5}], "content is 5"),
    ([{"role": "assistant"}], "content is None"), ([{**USER, "wieght": 0}], "the field 'wieght', which is not read"),
    ([USER, {**ANSWER, "weight": 0.5}], r"messages\[1\].weight is 0.5; it must be 0"),
    ([USER, {**ANSWER, "weight": True}], "weight is True"),
    ([USER, {**ANSWER, "weight": "0"}], "weight is '0'"),
    ([USER, {**ANSWER, "tool_calls": {}}], "tool_calls is {}"),
    ([USER, {**ANSWER, "tool_calls": [1]}], "tool_calls is"),
    ([USER, {**ANSWER, "reasoning_content": 1}], "reasoning_content is 1"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only text is read"),
    ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
]


@pytest.mark.parametrize(("messages", "told"), REFUSED)
def test_what_is_no_conversation_is_refused(made: Any, messages: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        made(CHATML).encode_chat(messages)


def test_an_answer_that_says_nothing_is_refused_in_training_alone(made: Any) -> None:
    tokenizer, chat = made(CHATML), [USER, {"role": "assistant", "content": ""}]
    with pytest.raises(InputError, match=r"f:2: messages\[1\].content is empty"):
        check_messages(chat, "f:2")
    assert said(tokenizer, *tokenizer.encode_chat(chat)) == "<|end|>"
    check_messages([USER, {"role": "assistant", "content": "", "weight": 0}], "f:1")
    check_messages([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "f:1", [TOOL])
    with pytest.raises(InputError, match="f:1: tools is 5"):
        check_messages([USER, ANSWER], "f:1", 5)


def test_parts_of_content_are_joined(made: Any) -> None:
    tokenizer = made(CHATML)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}]}, ANSWER]
    assert tokenizer.encode_chat(parts) == tokenizer.encode_chat([USER, ANSWER])
    plain = made(None)
    assert plain.encode_chat(parts) == plain.encode_chat([USER, ANSWER])


def test_weights_say_which_answers_are_trained(made: Any) -> None:
    other = {"role": "assistant", "content": "Other."}
    for tokenizer in (made(CHATML), made(None)):
        for weights, wanted in (((1, 1), "That it is.<|end|>Other.<|end|>"), ((0, 1), "Other.<|end|>"),
                                ((1, 0), "That it is.<|end|>"), ((None, 0), "That it is.<|end|>"), ((0, 0), "")):
            chat = [USER, ANSWER | {"weight": weights[0]}, USER, other | {"weight": weights[1]}]
            ids, trained = tokenizer.encode_chat(chat)
            assert said(tokenizer, ids, trained) == wanted
            assert ids == tokenizer.encode_chat([USER, ANSWER, USER, other])[0]


LEFT_OUT: list[tuple[str, list[dict[str, Any]], Any, str]] = [
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}",
     [{"role": "system", "content": "Be nice."}, USER, ANSWER], None,
     r"messages\[0\]: .* leaves out its content \('Be nice"),
    ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}",
     [USER, {"role": "assistant", "content": "<think>\nWell, well.\n</think>\nYes."}], None,
     r"messages\[1\]: .* leaves out part of its content \('<think>"),
    (CHATML, [USER, ANSWER | {"reasoning_content": "Well."}], None, r"leaves out its reasoning_content \('Well"),
    (CHATML.replace("m.content", "(m.content or '')"),
     [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], None,
     r"messages\[1\]: .* leaves out its call of 'look'"),
    (CHATML, [USER, ANSWER], [TOOL], r"leaves out tools\[0\] \('look'\)"),
    (CHATML.replace("m.content", "(m.tool_calls[0].function | tojson if m.tool_calls else m.content)"),
     [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": '}}]}], None,
     r"messages\[1\]: .* quotes the arguments of 'look' a second time"),
    ("{% for m in messages %}{{ m.content }}{% if loop.last %}<|end|>{% endif %}{% endfor %}",
     [USER, ANSWER, USER, ANSWER], None, r"messages\[1\]: .* otherwise once more follows"),
    ("{{ messages[0].content }}{{ messages[-1].content }}<|end|>", [USER, ANSWER, USER, ANSWER | {"content": "Other."}],
     None, r"messages\[1\]: .* otherwise once more follows"),
    ("{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
     [USER, ANSWER | {"weight": 0}, USER, ANSWER], None, "marks 4 parts as generated, but there are 2 assistant turns"),
    ("{% for m in messages %}{% if m.x %}{% generation %}{% endgeneration %}{% endif %}{{ m.content }}{% endfor %}",
     [USER, ANSWER], None, "wraps nothing of this conversation"),
    ("{% for m in messages %}{{ ' th' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
     "{{ ' th' if add_generation_prompt }}", [USER, {"role": "assistant", "content": "e dog"}], None, "joins ' th'"),
]


@pytest.mark.parametrize(("source", "messages", "tools", "told"), LEFT_OUT)
def test_what_a_template_leaves_out_or_hides_is_an_error(
        made: Any, source: str, messages: Any, tools: Any, told: str) -> None:
    tokenizer = made(source)
    with pytest.raises(InputError, match=f"^f.jsonl:7: .*{told}"):
        encode_conversations([(messages, tools, "f.jsonl:7")], tokenizer)


def test_a_stop_behind_what_generation_wraps_is_trained(made: Any) -> None:
    source = ("{% for m in messages %}{{ '<|begin|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
              "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}")
    tokenizer = made(source)
    assert said(tokenizer, *tokenizer.encode_chat([USER, ANSWER, USER, ANSWER])) == "That it is.<|end|>" * 2
    none = made(source.replace("<|end|>", ""))
    ids, trained = none.encode_chat([USER, ANSWER])
    assert ids[-1] == none.eos_id and trained[-1] and said(none, ids, trained).startswith("That it is.")
    assert none.turn_end is None and tokenizer.turn_end == "<|end|>"


def test_an_answer_that_begins_as_the_header_ends(made: Any) -> None:
    """"\\n" + "\\n" is one token: the ids stay transformers', and that token is trained."""
    tokenizer = made("{% for m in messages %}{{ m.role + '\n\n\n\n' + m.content }}{% endfor %}"
                     "{{ 'assistant\n\n\n\n' if add_generation_prompt }}")
    ids, trained = tokenizer.encode_chat([USER, {"role": "assistant", "content": "\n\n\n\n    b"}])
    text = tokenizer.render_chat([USER, {"role": "assistant", "content": "\n\n\n\n    b"}])
    assert ids[:-1] == tokenizer.encode(text, bos=False, parse_special=True)
    assert "b<|end|>" in said(tokenizer, ids, trained) and "assistant" not in said(tokenizer, ids, trained)


def test_messages_about_private_characters(made: Any) -> None:
    """Lone surrogates stand for control strings while a template runs; private-use characters are ordinary text."""
    tokenizer = made(CHATML)
    for text in ("\ue000 \U0010fffd", "a <|end|> \ue000 <|begin|><|end|>", "\\udc00 <|end|>", '"<|end|>"'):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ids, trained = tokenizer.encode_chat(chat)
        assert said(tokenizer, ids, trained) == text + "<|end|>"
        assert tokenizer.render_chat(chat) == f"<|begin|>user\n{text}<|end|>\n<|begin|>assistant\n{text}<|end|>\n"
        assert [number for number in ids if number in tokenizer.control_ids] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="U\\+10F7D5"):
        tokenizer.encode_chat([{"role": "user", "content": "\U0010f7d51\U0010f7d5 <|end|>"}])
    source = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}"
    assert made(source).render_chat([{"role": "user", "content": "é <|end|>"}]) == '"\\u00e9 <|end|>"'


def test_the_plain_template_refuses_what_it_cannot_write(made: Any) -> None:
    plain = made(None)
    assert plain.render_chat([USER, ANSWER]) == "### User:\nWhat?\n\n### Assistant:\nThat it is.<|end|>"
    assert plain.turn_end == "<|end|>" and plain.template_for() is None
    prompt, trained = plain.encode_chat([USER, ANSWER, USER], add_generation_prompt=True)
    assert not any(trained)
    assert plain.encode_chat([USER, ANSWER, USER, ANSWER])[0][:len(prompt)] == prompt
    for messages, tools, told in (
            ([{"role": "developer", "content": "x"}], None, r"messages\[0\].role is 'developer', but the tokenizer"),
            ([USER, {"role": "tool", "content": "x"}], None, r"messages\[1\].role is 'tool'"),
            ([USER, {"role": "system", "content": "x"}], None, "a system turn must be the first"),
            ([USER, ANSWER], [TOOL], "has tools, but"),
            ([USER, ANSWER | {"tool_calls": [CALL]}], None, "has tool_calls"),
            ([USER, ANSWER | {"thinking": "hm"}], None, "has thinking, but")):
        for ask in (plain.encode_chat, plain.render_chat):
            with pytest.raises(InputError, match=told):
                ask(messages, tools)
