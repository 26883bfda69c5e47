"""minitune chat: lines from a pipe, a terminal with its keys, and the commands within."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

pytest.importorskip("tyro")
import minitune as mt
from minitune.commands.chat import Chat, Conversation
from minitune.commands.flags.groups import Sampling

RUN = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)       # whoever runs the tests may ignore it
from minitune.commands.chat import Chat
Chat(Path(sys.argv[1]), device="cpu", dtype="float32", max_new_tokens=int(sys.argv[2])).run()
"""


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """One that changes what the model says."""
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=4))
    for each in model.network.adapters().values():
        each.B.data.normal_(0, 0.5)
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_adapter(out)
    return out


def _talk(monkeypatch, capsys, folder, text, **settings):
    """(stdout, stderr) of a chat that reads `text` from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    Chat(folder, device="cpu", dtype="float32", max_new_tokens=8, **settings).run()
    found = capsys.readouterr()
    return found.out, found.err


def test_each_line_of_a_pipe_is_a_turn(monkeypatch, capsys, tiny):
    out, err = _talk(monkeypatch, capsys, tiny, "Hi\n\n  \r\nAnd now?", system="Be brief.")
    model = mt.load(tiny, device="cpu", dtype="float32")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    first = model.chat(messages, 8)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    second = model.chat(messages, 8)
    assert out == f"{first}\n{second}\n"
    assert err.count("cut off after 8 tokens") == 2 and ">" not in err


def test_commands_within(monkeypatch, capsys, tiny, adapter):
    model = mt.load(tiny, device="cpu", dtype="float32", adapter=adapter)
    def say(*messages):
        return model.chat([{"role": role, "content": text} for role, text in messages], 8, temperature=0.9, seed=3)

    hi = ("user", "Hi")
    with_adapter, system = say(hi), say(("system", "Be kind."), hi)
    with model.adapter_disabled():
        base = say(hi)
    assert len({with_adapter, system, base}) == 3
    out, err = _talk(monkeypatch, capsys, tiny, "Hi\n/reset\nHi\n/system Be kind.\nHi\n/reset\nHi\n/system\nHi\n"
                     "/adapter off\n/reset\nHi\n/adapter on\n/reset\nHi\n/help\n/exit\nHi\n", adapter=adapter,
                     sampling=Sampling(temperature=0.9, seed=3))
    assert out == "".join(f"{text}\n" for text in (with_adapter, with_adapter, system, system, with_adapter, base,
                                                   with_adapter))
    assert "(adapter off)" in err and "/adapter on|off" in err and "(a new conversation)" in err


@pytest.mark.parametrize(("line", "words"), [("/adapter", "/adapter is no command"),
                                             ("/adapter maybe", "/adapter maybe is no command"),
                                             ("/adapter off", "no adapter is loaded")])
def test_a_wrong_command_ends_a_pipe_with_an_error(monkeypatch, capsys, tiny, line, words):
    with pytest.raises(mt.InputError, match=words):
        _talk(monkeypatch, capsys, tiny, f"{line}\nHi\n")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", [" /reset", "/etc/hosts, what is it?", "/ hi"])
def test_a_message_may_begin_with_a_slash(monkeypatch, capsys, tiny, line):
    out, _ = _talk(monkeypatch, capsys, tiny, f"{line}\n")
    model = mt.load(tiny, device="cpu", dtype="float32")
    assert out == model.chat([{"role": "user", "content": line}], 8) + "\n"


def test_tools_are_those_of_a_file(monkeypatch, capsys, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    out, _ = _talk(monkeypatch, capsys, folder, "Hi\n", tools=tmp_path / "tools.json",
                   sampling=Sampling(temperature=0.9, seed=3))
    model = mt.load(folder, device="cpu", dtype="float32")
    with_tools, without = (model.chat([{"role": "user", "content": "Hi"}], 8, temperature=0.9, seed=3, tools=each)
                           for each in (tools, None))
    assert out == with_tools + "\n" and with_tools != without
    for wrong in ("{}", "[]", "[1]"):
        (tmp_path / "tools.json").write_text(wrong)
        with pytest.raises(mt.InputError, match=r"tools\.json: must hold a list of tools"):
            _talk(monkeypatch, capsys, folder, "Hi\n", tools=tmp_path / "tools.json")


def test_without_a_tokenizer_it_does_not_begin(monkeypatch, capsys, tmp_path):
    mt.init("tiny", tmp_path, seed=1)
    with pytest.raises(mt.InputError, match="no tokenizer"):
        _talk(monkeypatch, capsys, tmp_path, "Hi\n")


def test_at_a_terminal_an_error_costs_the_turn_alone(monkeypatch, capsys, tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    talk = Conversation(model, None, 8, {})
    talk.interactive = True
    lines = iter(["\udce9", "/nonsense", "Hi"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    talk.run()
    found = capsys.readouterr()
    assert found.out == model.chat([{"role": "user", "content": "Hi"}], 8) + "\n"
    assert "surrogate" in found.err and "/nonsense is no command" in found.err
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_an_empty_answer_leaves_the_conversation_as_it_was(monkeypatch, capsys, tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    talk = Conversation(model, "Be brief.", 0, {})
    talk.ask("Hi")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "an empty answer" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_reach_a_pipe_but_no_terminal(monkeypatch, capsys, terminal):
    class Pieces(list):
        finish_reason = "stop"

    class Model:
        def stream(self, *_, **__):
            return Pieces(["a\x1b]0;title\x07", "b\n"])

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    talk = Conversation(Model(), None, 8, {})
    talk.ask("Hi")
    assert capsys.readouterr().out == ("a\\x1b]0;title\\x07b\n\n" if terminal else "a\x1b]0;title\x07b\n\n")
    assert talk.messages[-1]["content"] == "a\x1b]0;title\x07b\n"
    capsys.readouterr()


def _end():
    raise EOFError


def _read(terminal, until, again=lambda: None):
    """What the program writes, until `until` holds of it. `again` is done whenever it has been silent for a while: a
    signal or a key between its prompt and its wait for a line is heard with the next one."""
    text, end = "", time.monotonic() + 120
    while not until(text):
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 2)[0]:
            try:
                text += os.read(terminal, 4096).decode("utf-8", "replace")
            except OSError:     # the program has closed the terminal
                break
        else:
            again()
    return text


def test_keys_at_a_terminal(tiny):
    """Ctrl-C stops an answer, at the prompt it ends nothing; the line before is in the history; Ctrl-D ends."""
    ours, theirs = pty.openpty()
    program = subprocess.Popen([sys.executable, "-c", RUN, str(tiny), "1000000"], stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    try:
        _read(ours, lambda text: text.endswith("> "))
        os.write(ours, b"Hello\n")
        _read(ours, lambda text: len(text) > 60)
        program.send_signal(signal.SIGINT)
        assert "(stopped)" in _read(ours, lambda text: text.endswith("> "))
        interrupt = partial(program.send_signal, signal.SIGINT)
        interrupt()
        assert "Ctrl-D or /exit ends" in _read(ours, lambda text: text.endswith("> "), interrupt)
        line_before = partial(os.write, ours, b"\x10")       # Ctrl-P
        line_before()
        assert "Hello" in _read(ours, lambda text: "Hello" in text, line_before)
        os.write(ours, b"\x15")     # Ctrl-U: none of it
        os.write(ours, b"\x04")
        _read(ours, lambda text: False)
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.wait()
        os.close(ours)
