"""Chats that a template would teach otherwise than they say: a part left out, marks that do not fit, broken characters.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitune.data import encode
from minitune.data.chat import encode_conversations
from minitune.data.formats import to_sample
from minitune.data.mask import trained_spans
from minitune.data.template import ChatTemplate
from minitune.data.template_process import PROCESS
from minitune.data.tokenizer import load_tokenizer
from minitune.errors import InputError

Chat = list[dict[str, Any]]
CONTROL = ("<|im_start|>", "<|im_end|>")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TOOL = {"type": "function", "function": {"name": "look"}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def spans(source: str, chat: Chat, control: tuple[str, ...] = CONTROL) -> list[str]:
    template = ChatTemplate("t", source, {}, control)
    rendered = next(template.render([(chat, None, "f:1")], mask=True))
    return [rendered.text[start:end] for start, end in trained_spans(rendered, template, None)[0]]


WITHOUT_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("content", ["user", "Be kind.\nhi", "e", "Be kind", "assistant\n", " x "])
def test_a_system_turn_that_is_left_out(content: str) -> None:
    chat = [system(content), user("hi there"), bot("x")]
    with pytest.raises(InputError, match=r"f:1: messages\[0\]: the chat template t leaves out its content"):
        spans(WITHOUT_SYSTEM, chat)
    assert spans(CHATML, chat) == ["x<|im_end|>"]


def test_all_of_a_turn_must_be_written() -> None:
    first_line = CHATML.replace("m.content", "m.content.split('\n')[0]")
    with pytest.raises(InputError, match=r"messages\[0\]: .* leaves out its content \('two'\)"):
        spans(first_line, [user("one\ntwo"), bot("x")])
    looks = CHATML.replace("{{ m.content }}", "{{ m.content if m.content|length < 4 else m.content[:3] }}")
    with pytest.raises(InputError, match=r"messages\[2\]: .* leaves out its content"):    # marks change what it writes
        spans(looks, [user("abcd"[:3]), bot("abc"), user("abcd"), bot("x")])
    moved = ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.first %}"
             "{% for s in messages if s.role == 'system' %}\n{{ s.content }}{% endfor %}{% endif %}<|im_end|>\n"
             "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert spans(moved, [system("kind"), user("hi"), bot("x")]) == ["x<|im_end|>"]
    thought = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    chat = [user("q"), bot("<think>why</think>because", weight=0), user("r"), bot("x")]
    assert spans(thought, chat) == ["x<|im_end|>"]


GENERATION = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' CONDITION %}"
              "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
              "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}")


def test_marks_that_do_not_fit_the_turns() -> None:
    chat = [user("q"), bot("4"), user("r"), bot("42")]
    assert spans(GENERATION.replace("CONDITION", ""), chat) == ["4<|im_end|>", "42<|im_end|>"]
    with pytest.raises(InputError, match=r"marks 1 parts as generated, but there are 2 assistant turns"):
        spans(GENERATION.replace("CONDITION", "and loop.last"), chat)
    assert spans("{# wrap it in {% generation %} #}" + CHATML, chat) == ["4<|im_end|>", "42<|im_end|>"]


@pytest.mark.parametrize("code", ["\\ud800", "\\udc05", "\\udfff", "\\udffe", "\\udffd"])
def test_a_template_that_writes_a_lone_surrogate(code: str) -> None:
    with pytest.raises(InputError, match=r"f:1: the chat template t .*writes a lone surrogate"):
        spans("{{ '" + code + "' }}" + CHATML, [user("q"), bot("a")])


def test_too_many_control_strings() -> None:
    many = tuple(f"<x{i}>" for i in range(1001))
    assert spans(CHATML, [user("".join(many[1:])), bot("a")], CONTROL + many) == ["a<|im_end|>"]
    with pytest.raises(InputError, match=r"^f:1: spells 1,001 different control tokens; at most 1,000"):
        spans(CHATML, [user("".join(many)), bot("a")], CONTROL + many)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit on memory is Linux's")
def test_a_batch_of_large_conversations_has_room() -> None:
    template = ChatTemplate("t", CHATML, {}, CONTROL)
    chats = [([user("q"), bot("a" * 1_000_000)], None, f"f:{i}") for i in range(100)]
    assert sum(len(chat.trained) for chat in template.render(chats, mask=True)) == 100


def test_tools_and_thoughts_count_for_a_chunk() -> None:
    long = "x" * (encode.CHUNK_CHARACTERS // 2)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": long}}}
    for answer, tools in ((bot("a", tool_calls=[call]), None), (bot("a", reasoning_content=long), None),
                          (bot("a"), [TOOL | {"description": long}])):
        row: dict[str, Any] = {"messages": [user("q"), answer]} | ({"tools": tools} if tools else {})
        assert [len(chunk) for chunk in encode.chunks([to_sample(row, "w")] * 4)] == [2, 2]


def test_a_text_that_cannot_be_encoded_is_named(small_spm: Path) -> None:
    samples = [to_sample({"text": text}, f"f:{place}") for place, text in enumerate(("a", "b\ud800"))]
    with pytest.raises(InputError, match=r"^f:1: encode: '\\ud800' at character 1 is a lone surrogate"):
        encode.encode(samples, load_tokenizer(small_spm))


@pytest.fixture
def tokenizer(byte_level: Callable[..., Path]) -> Any:
    chatml = CHATML.replace("<|im_start|>", "<|begin|>").replace("<|im_end|>", "<|end|>")
    listed = [{"name": "default", "template": chatml},
              {"name": "tool_use", "template": "{{ tools | tojson }}" + chatml}]
    return load_tokenizer(byte_level(tokenizer_config={
        "bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": False, "chat_template": listed}))


def test_conversations_are_rendered_together_whatever_their_order(tokenizer: Any, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    chats = [([user(f"q{i}"), bot(f"a{i}")], [TOOL] if i % 2 else None, f"f:{i}") for i in range(20)]
    alone = [encode_conversations([chat], tokenizer)[0] for chat in chats]
    calls: list[int] = []
    render = PROCESS.render

    def counted(source: str, variables: Any, now: Any, requests: Any) -> Any:
        calls.append(len(requests))
        return render(source, variables, now, requests)

    monkeypatch.setattr(PROCESS, "render", counted)
    assert encode_conversations(chats, tokenizer) == alone and sorted(calls)[-2:] == [10, 10] and len(calls) <= 3


@pytest.mark.parametrize(("chat", "message"), [
    ([user("q"), bot("a", weight=False)], r"messages\[1\].weight is False; it must be 0"),
    ([user("q") | {"weight": 1}, bot("a")], r"messages\[0\].weight is 1, but only an assistant's turns are trained"),
])
def test_weights_are_those_of_answers(tokenizer: Any, chat: Chat, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer.encode_chat(chat)
    assert tokenizer.encode_chat([user("q") | {"weight": 0}, bot("a", weight=1)])[1][-2:] != [False, False]


def test_a_renderer_that_was_ended_is_started_again(tokenizer: Any) -> None:
    ids = tokenizer.encode_chat([user("q"), bot("a")])
    process = PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    assert tokenizer.encode_chat([user("q"), bot("a")]) == ids


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_renders(tokenizer: Any) -> None:
    held = threading.Event()

    def hold() -> None:
        with PROCESS._lock:
            held.set()
            time.sleep(1)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        json.dumps(tokenizer.encode_chat([user("q"), bot("a")]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
