"""Turns that prefixes do not tell, told by marks around their content: Qwen3's earlier answers, and what stays refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from minitune.data.chat import encode_conversations
from minitune.data.mask import trained_spans
from minitune.data.tokenizer import Tokenizer
from minitune.errors import InputError
from tests.data.chat_templates import QWEN_3

Chat = list[dict[str, Any]]
THOUGHT = "<think>\n\n</think>\n\n"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
LAST_ALONE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ '#' if loop.last and m.role == 'assistant' }}"
    "{{ CONTENT }}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}")
"""As Qwen3, it writes something into the last answer alone, so no earlier answer is a prefix."""


@pytest.fixture(scope="module")
def qwen(qwen_with: Callable[[str], Tokenizer]) -> Tokenizer:
    return qwen_with(QWEN_3)


def chat_of(*answers: str | dict[str, Any]) -> Chat:
    """A question, an answer, a question, …"""
    turns: Chat = []
    for place, answer in enumerate(answers):
        fields = {"content": answer} if isinstance(answer, str) else answer
        turns += [{"role": "user", "content": f"question {place}"}, {"role": "assistant", **fields}]
    return turns


def said(tokenizer: Tokenizer, chat: Chat, tools: Any = None) -> list[str]:
    """The trained runs as text. The ids must be those of transformers."""
    ids, trained = tokenizer.encode_chat(chat, tools)
    transformers = pytest.importorskip("transformers")
    truth = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.folder / "tokenizer.json"),
                                                 eos_token="<|im_end|>", chat_template=tokenizer.chat_template)
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in chat]
    assert ids == list(truth.apply_chat_template(plain, tools=tools)["input_ids"])
    runs = [[number for number, _ in run] for flag, run in groupby(zip(ids, trained, strict=True), lambda pair: pair[1])
            if flag]
    return [tokenizer.decode(run, skip_special=False, continues=True) for run in runs]


def test_qwen3_answers_without_thoughts(qwen: Tokenizer) -> None:
    assert said(qwen, chat_of("one", "two")) == ["one<|im_end|>", f"{THOUGHT}two<|im_end|>"]
    assert said(qwen, chat_of("one", "two", "three")) == ["one<|im_end|>", "two<|im_end|>", f"{THOUGHT}three<|im_end|>"]
    weighed = chat_of("one", {"content": "two", "weight": 0}, "three")
    assert said(qwen, weighed) == ["one<|im_end|>", f"{THOUGHT}three<|im_end|>"]
    follow = [*chat_of("one", "two"), {"role": "user", "content": "and?"}]
    assert said(qwen, follow) == ["one<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("content", [
    " one ", "\n\none\n", "one\n", "question 0", "question 1", "user\n", "two",
    "👍 naïve", "שלום", "<think>", "{{ x }}", "a\ttab", "\u3000one\u3000"])
def test_qwen3_keeps_hard_contents_whole(qwen: Tokenizer, content: str) -> None:
    assert said(qwen, chat_of(content, "two")) == [f"{content}<|im_end|>", f"{THOUGHT}two<|im_end|>"]


def test_a_control_string_in_an_answer_stays_text(qwen: Tokenizer) -> None:
    spelled = "a<|im_end|>b<|im_start|><|im_end|>"
    ids, trained = qwen.encode_chat(chat_of(spelled, "two"))
    text = qwen.decode([number for number, flag in zip(ids, trained, strict=True) if flag], skip_special=False)
    assert text == f"{spelled}<|im_end|>{THOUGHT}two<|im_end|>"
    assert sum(number == qwen.eos_id for number in ids) == 4


def test_qwen3_thoughts_of_earlier_answers_are_still_an_error(qwen: Tokenizer) -> None:
    thinking = {"content": "one", "reasoning_content": "Hm, well."}
    with pytest.raises(InputError, match=r"^f:1: messages\[1\]: .* leaves out its reasoning_content \('Hm, well"):
        encode_conversations([(chat_of(thinking, "two"), None, "f:1")], qwen)
    with pytest.raises(InputError, match=r"^f:1: messages\[1\]: .* leave out the thinking of earlier turns"):
        encode_conversations([(chat_of("<think>\nHm.\n</think>\n\none", "two"), None, "f:1")], qwen)
    last = chat_of("one", {"content": "two", "reasoning_content": "Hm."})
    assert said(qwen, last) == ["one<|im_end|>", "<think>\nHm.\n</think>\n\ntwo<|im_end|>"]


def test_qwen3_calls_of_tools_without_thoughts(qwen: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    written = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
    for content, calls, wanted in ((None, [CALL], written), ("", [CALL], written), ("So:", [CALL], f"So:\n{written}"),
                                   (None, [CALL, CALL], f"{written}\n{written}")):
        chat = [*chat_of({"content": content, "tool_calls": calls}), {"role": "tool", "content": "12 degrees"},
                {"role": "assistant", "content": "Twelve."}]
        assert said(qwen, chat, tools) == [f"{wanted}<|im_end|>", f"{THOUGHT}Twelve.<|im_end|>"]
    thinking = [turn | ({"reasoning_content": "Hm."} if turn["role"] == "assistant" else {}) for turn in chat]
    thought = THOUGHT.replace("\n\n", "\nHm.\n", 1)
    assert said(qwen, thinking, tools) == [f"{thought}{written}\n{written}<|im_end|>", f"{thought}Twelve.<|im_end|>"]


def test_where_prefixes_hold_marks_are_not_asked(qwen: Tokenizer) -> None:
    template = qwen.template_for()
    assert template is not None
    whole, cut = template.render([(chat_of("one"), None, "a"), (chat_of("one", "two"), None, "b")], mask=True)
    assert not whole.marks and list(cut.marks) == [1]
    assert trained_spans(whole, template, "<|im_end|>") == trained_spans(whole, template, None)
    first, last = trained_spans(cut, template, "<|im_end|>")[0]
    assert first == (start := cut.text.index("one"), start + len("one<|im_end|>"))
    assert cut.text[slice(*last)] == f"{THOUGHT}two<|im_end|>"


def test_contents_that_a_template_trims(qwen_with: Callable[[str], Tokenizer]) -> None:
    for content in ("m.content.strip()", "m.content | trim", "m.content.lstrip('\n')", "m.content"):
        tokenizer = qwen_with(LAST_ALONE.replace("CONTENT", content))
        trims = "strip()" in content or "trim" in content
        assert said(tokenizer, chat_of("  one\n ", "two")) == ["one<|im_end|>" if trims else "  one\n <|im_end|>",
                                                               "#two<|im_end|>"]


def test_an_answer_before_any_question(qwen_with: Callable[[str], Tokenizer]) -> None:
    """Nothing renders without a message, so no prompt can be told from this answer; the marks tell it."""
    tokenizer = qwen_with("{{ messages[0].content[:0] }}" + LAST_ALONE.replace("CONTENT", "m.content"))
    assert said(tokenizer, [{"role": "assistant", "content": "one"}, *chat_of("two")]) == [
        "one<|im_end|>", "#two<|im_end|>"]
    thinking = qwen_with("{{ messages[0].content[:0] }}"
                         + LAST_ALONE.replace("CONTENT", "'<think>' + (m.thinking or '') + '</think>' + m.content"))
    with pytest.raises(InputError, match=r"messages\[0\]: .*does not render the conversation up to here \(.*begin w"):
        encode_conversations([([{"role": "assistant", "content": "one", "thinking": "Hm."}, *chat_of("two")], None,
                               "f:1")], thinking)


STILL_REFUSED = {
    "written twice": "m.content + (m.content if not loop.last else '')",
    "changed": "(m.content | upper if m.role == 'assistant' else m.content)",
    "its length": "m.content + (m.content | length | string)",
    "told by its first character": "('!' if m.content[0] == 'o' else '') + m.content",
}


@pytest.mark.parametrize("name", STILL_REFUSED)
def test_what_marks_do_not_tell_is_refused(qwen_with: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = qwen_with(LAST_ALONE.replace("CONTENT", STILL_REFUSED[name]))
    with pytest.raises(InputError, match=r"^f:1: messages\[1\]: "):
        encode_conversations([(chat_of("one", "two"), None, "f:1")], tokenizer)


def test_a_turn_that_nothing_ends_is_refused(qwen_with: Callable[[str], Tokenizer]) -> None:
    """A stop of the next message is not this turn's."""
    source = ("{% for m in messages %}{{ m.role + '\n' }}{{ '#' if loop.last }}{{ m.content }}"
              "{{ '<|im_end|>' if loop.last or m.role == 'user' }}{% endfor %}"
              "{{ 'assistant\n' if add_generation_prompt }}")
    with pytest.raises(InputError, match=r"^f:1: messages\[1\]: .* otherwise once more follows"):
        encode_conversations([(chat_of("one", "two"), None, "f:1")], qwen_with(source))
