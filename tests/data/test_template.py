"""Chat templates: where they are read from, what they see, and hostile ones, which end in one error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path

import pytest

from minitune.data import template_child
from minitune.data.template import ChatTemplate
from minitune.data.template_process import PROCESS, TemplateProcess
from minitune.data.tokenizer import load_tokenizer
from minitune.data.tokenizer_writer import copy_tokenizer
from minitune.errors import InputError
from tests.data.hostile_templates import HOSTILE

Make = Callable[..., Path]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOL = {"type": "function", "function": {"name": "look"}}


def render(source: str, messages: list[dict[str, object]] | None = None, **variables: str) -> str:
    return next(ChatTemplate("here", source, variables, []).render([(messages or CHAT, None, "chat")])).text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^f:3: the chat template .*{re.escape(name)} does not render"):
        list(ChatTemplate(name, HOSTILE[name], {}, []).render([(CHAT, None, "f:3")], mask=True))
    assert time.monotonic() - start < 30        # 0.4 s of processor time; this machine may be busy
    assert render("{{ messages | length }}") == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit on memory is Linux's")
def test_hostile_templates_get_little_memory() -> None:
    script = Path(__file__).with_name("hostile_templates.py")
    packages = Path(str(find_spec("jinja2").origin)).parents[1]  # type: ignore[union-attr]
    found = subprocess.run([sys.executable, "-I", str(script), template_child.__file__, str(packages)], check=True,
                           capture_output=True, text=True)
    assert 5e6 < int(found.stdout) < 200e6


def test_time_and_memory_grow_with_a_long_conversation() -> None:
    long = [{"role": role, "content": "long content \n" * 500} for _ in range(200) for role in ("user", "assistant")]
    assert len(render("{% for m in messages %}{{ m.content }}{% endfor %}", long)) == 400 * 500 * 14


CALLS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments HOW }}" \
    "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("how", "text"), [("| tojson", '{"at": "sea"}'), ("", '{"at":  "sea"}')])
def test_arguments_that_are_json_text_are_written_once(how: str, text: str) -> None:
    """A template that writes JSON gets the object, one that writes text gets the text, as it is."""
    for arguments in ('{"at":  "sea"}', {"at": "sea"} if how else '{"at":  "sea"}'):
        calls = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
        chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": calls}]
        assert render(CALLS.replace("HOW", how), chat) == "hi" + text
        assert calls[0]["function"]["arguments"] is arguments       # the caller's is as it was
    for broken in ('{"at":', "[1]", '"sea"', '{"a": 1, "a": 2}'):       # is left to the template
        calls = [{"function": {"name": "look", "arguments": broken}}]
        chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": calls}]
        assert render(CALLS.replace("HOW", how), chat) == "hi" + (json.dumps(broken) if how else broken)


def test_the_process_comes_back() -> None:
    request = json.dumps({"messages": CHAT, "tools": None, "prompt": False, "cuts": [], "seen": []}).encode()
    own = TemplateProcess()
    slow = "{% if messages[0].content == 'slow' %}" + HOSTILE["nested loops"] + "{% endif %}{{ messages[0].content }}"
    found = own.render(slow, {}, datetime.now(), [request, request.replace(b"hi", b"slow"), request])
    assert [answer.get("text") for answer in found] == ["hi", None] and "too long" in found[1]["error"]
    assert [answer["text"] for answer in own.render(slow, {}, datetime.now(), [request] * 3)] == ["hi"] * 3
    own.close()
    own.close()
    assert own.render("a", {}, datetime.now(), [request])[0]["text"] == "a"
    own.close()


def test_threads_and_forks_do_not_mix_their_answers() -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            found[number] = render(f"{number}" * 50)
            assert found[number] == f"{number}" * 50

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    if hasattr(os, "fork"):
        child = os.fork()
        if not child:
            os._exit(0 if render("child" * 50) == "child" * 50 else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert render("parent") == "parent"


def test_what_a_template_sees_is_what_transformers_shows_it() -> None:
    source = ("{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}|{{ tools is none }}|{{ documents is none }}|"
              "{{ add_generation_prompt }}|{{ messages | tojson }}|{{ '<' | tojson }}|"
              "{{ messages[0] | tojson(indent=1) }}")
    messages = [{"role": "user", "content": "é", "name": None}, {"role": "assistant", "content": "y", "weight": 0}]
    assert render(source, messages, bos_token="B", eos_token="E") == (
        'B|E|False|True|True|False|[{"role": "user", "content": "é"}, {"role": "assistant", "content": "y"}]|"<"|'
        '{\n "role": "user",\n "content": "é"\n}')
    assert render("{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n"
                  "{% break %}{% endfor %}") == "yes\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))
    for now in (datetime(2024, 7, 26, 23, 59), datetime(2031, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))):
        template = ChatTemplate("here", "{{ strftime_now('%d %b %Y %H:%M%z') }}", {}, [], lambda now=now: now)
        assert next(template.render([(CHAT, None, "chat")])).text == now.strftime("%d %b %Y %H:%M%z")
    with pytest.raises(InputError, match="does not render this conversation: alternate!"):
        render("{{ raise_exception('alternate!') }}")
    with pytest.raises(InputError, match="line 2: "):
        render("a\n{% if %}")


def test_where_templates_are_read_from(byte_level: Make, tmp_path: Path) -> None:
    def texts(folder: Path) -> list[str]:
        tokenizer = load_tokenizer(folder)
        return [tokenizer.render_chat(CHAT), tokenizer.render_chat(CHAT, [TOOL])]

    listed = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    folder = byte_level(tokenizer_config={"chat_template": listed})
    assert texts(folder) == ["d", "t"]
    old = byte_level(chat_template={"chat_template": "j"})
    assert texts(old) == ["j", "j"]
    (folder / "chat_template.jinja").write_text("f", encoding="utf-8")
    assert texts(folder) == ["f", "t"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("a", encoding="utf-8")
    assert texts(folder) == ["f", "a"]
    copy_tokenizer(folder, tmp_path)
    assert texts(tmp_path) == ["f", "a"]
    with pytest.raises(InputError, match=r"has chat templates for rag, but none named default"):
        texts(byte_level(tokenizer_config={"chat_template": [{"name": "rag", "template": "r"}]}))
    for wrong in (5, [1], [{"name": "default"}], {"default": "d"}):
        with pytest.raises(InputError, match=r"tokenizer_config.json: chat_template is"):
            load_tokenizer(byte_level(tokenizer_config={"chat_template": wrong}))


def test_a_template_cannot_open_files(tmp_path: Path) -> None:
    """Even outside the sandbox: the process that it runs in can open none."""
    found = subprocess.run(
        [sys.executable, "-I", "-c", f"import runpy; child = runpy.run_path({template_child.__file__!r})\n"
         "child['_confine']()\n"
         f"open({str(tmp_path / 'x')!r}, 'w')"], capture_output=True, text=True)
    assert found.returncode == 1 and "Too many open files" in found.stderr and not (tmp_path / "x").exists()
    assert PROCESS.render("a", {}, datetime.now(), []) == []
