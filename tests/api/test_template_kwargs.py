"""Settings of the chat template go with a model, its adapter and a run: what was trained with them is asked with them.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib

import pytest

import minitune as mt
from minitune.checkpoint.folders import ABOUT
from minitune.cli import main
from minitune.training.run import Observer

TEMPLATE = ("{% for m in messages %}{{ '### ' + m.role + (' ' ~ style if style is defined else '') + ':\n' + m.content "
            "+ (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
            "{{ ('### assistant' + (' ' ~ style if style is defined else '') + ':\n') if add_generation_prompt }}")
CHAT = [{"role": "user", "content": "Hi"}]
BRIEF = {"style": "brief"}


@pytest.fixture
def styled(tiny, tmp_path):
    """A model whose chat template reads `style`."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _asked(model):
    return model.tokenizer.render_chat(CHAT, add_generation_prompt=True)


def test_an_adapter_brings_those_that_it_was_trained_with(styled, tmp_path):
    adapter = tmp_path / "adapter"
    mt.load(styled, device="cpu", lora=mt.LoRA(rank=2), chat_template_kwargs=BRIEF).save_adapter(adapter)
    assert json.loads((adapter / ABOUT).read_text())["chat_template_kwargs"] == BRIEF
    assert _asked(mt.load(styled, device="cpu", adapter=adapter)).endswith("### assistant brief:\n")
    other = mt.load(styled, device="cpu", adapter=adapter, chat_template_kwargs={"style": "long"})
    assert _asked(other).endswith("### assistant long:\n")
    assert _asked(mt.load(styled, device="cpu", adapter=adapter, chat_template_kwargs={})).endswith("### assistant:\n")
    mt.load(styled, device="cpu", lora=mt.LoRA(rank=2)).save_adapter(adapter)
    assert "chat_template_kwargs" not in json.loads((adapter / ABOUT).read_text())


def test_errors_name_who_said_it(tiny, styled, tmp_path):
    with pytest.raises(mt.InputError, match=r"^load: chat_template_kwargs: the chat template does not read 'stile'; "
                                            r"did you mean 'style'\?"):
        mt.load(styled, device="cpu", chat_template_kwargs={"stile": "brief"})
    adapter = tmp_path / "adapter"
    mt.load(styled, device="cpu", lora=mt.LoRA(rank=2), chat_template_kwargs=BRIEF).save_adapter(adapter)
    told = re.compile(rf"adapter/{ABOUT}: the adapter was trained with style set in its chat template, which that of ")
    with pytest.warns(UserWarning, match=told):
        other = mt.load(tiny, device="cpu", adapter=adapter)
    assert other.tokenizer.chat_template_kwargs == {}
    bare = tmp_path / "bare"
    mt.init("tiny", bare, seed=1)
    with pytest.raises(mt.InputError, match=f"^load: chat_template_kwargs is .*{bare} holds no tokenizer"):
        mt.load(bare, device="cpu", chat_template_kwargs=BRIEF)
    for given in (None, {}):        # ids need no template
        assert mt.load(bare, device="cpu", adapter=adapter, chat_template_kwargs=given).adapter_path == adapter
    with pytest.raises(mt.InputError, match=r"^load: chat_template_kwargs is 'style'; give a table"):
        mt.load(tmp_path / "nowhere-is-read-yet", device="cpu", chat_template_kwargs="style")
    (adapter / ABOUT).write_text(json.dumps({"chat_template_kwargs": ["style"]}))
    with pytest.raises(mt.InputError, match=rf"adapter/{ABOUT}: chat_template_kwargs is \['style'\]; give a table"):
        mt.load(styled, device="cpu", adapter=adapter)


def test_the_frame_of_an_answer_follows_them(styled):
    trailing = TEMPLATE.replace("m.content +", "m.content + (style | string if style is defined else '') +")
    (styled / "chat_template.jinja").write_text(trailing)
    model = mt.load(styled, device="cpu")
    frames = [model._turn.trail]
    model.tokenizer.chat_template_kwargs = BRIEF
    frames.append(model._turn.trail)
    for value in (True, 1):
        model.tokenizer.chat_template_kwargs = {"style": value}
        frames.append(model._turn.trail)
    assert frames == ["", "brief", "True", "1"]


def test_a_run_goes_on_with_those_that_it_was_begun_with(styled, tmp_path):
    class Impatient(Observer):
        def on_step(self, record):
            if record.step == 2:
                raise KeyboardInterrupt

    data = [{"messages": [*CHAT, {"role": "assistant", "content": f"Hello {i}"}]} for i in range(8)]
    how = {"tokens": 64, "max_steps": 4, "out": tmp_path / "run", "ask": ["Hi"], "max_new_tokens": 2, "quiet": True}

    def model(kwargs):
        return mt.load(styled, device="cpu", lora=mt.LoRA(rank=2), chat_template_kwargs=kwargs)

    with pytest.raises(KeyboardInterrupt):
        mt.train(model(BRIEF), data, observers=[Impatient()], **how)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["chat_template_kwargs"] == BRIEF
    for other, is_now in (({"style": "long"}, "'long'"), ({}, "not given")):
        told = f"begun: chat_template_kwargs.style is {is_now} and was 'brief'; give what was given then"
        with pytest.raises(mt.InputError, match=re.escape(told) + "$"):
            mt.train(model(other), data, resume=True, **how)
    assert mt.train(model(BRIEF), data, resume=True, **how).end == "finished"


def test_a_run_keeps_them_and_its_commands_use_them(styled, tmp_path, capsys):
    pytest.importorskip("tyro")
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": f"Hello {i}"}]}) + "\n"
                            for i in range(8)))
    out = tmp_path / "run"
    base, given = [str(styled), str(data)], ["--chat-template-kwargs", "style=brief"]
    small = ["--tokens", "128", "--device", "cpu"]
    main(["inspect", *base, *given, "--tokens", "128"])
    assert "### assistant brief:" in capsys.readouterr().out
    main(["train", *base, *given, *small, "--out", str(out), "--max-steps", "2", "--max-new-tokens", "2"])
    assert tomllib.loads((out / "train.toml").read_text())["samples"] == {"chat_template_kwargs": ["style=brief"]}
    assert json.loads((out / "adapter" / ABOUT).read_text())["chat_template_kwargs"] == BRIEF
    capsys.readouterr()

    def losses(*flags):
        """Of the base without and with the adapter, as the command prints them."""
        main(["evaluate", *base, *flags, *small])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss"))
        return line.removeprefix("loss (nats a token)").split()

    adapted = ["--adapter", str(out / "adapter")]
    without, by_adapter = losses(*given), losses(*adapted)
    assert by_adapter[:1] == without != losses()
    merged = tmp_path / "merged"
    main(["merge", str(styled), str(out / "adapter"), str(merged), "--data", str(data), *small])
    out = capsys.readouterr().out
    assert 'give them again: --chat-template-kwargs \'style="brief"\'\n' in out
    said = re.findall(r"^loss (\S+): (.*)$", out, re.MULTILINE)
    assert [loss for loss, _ in said[:2]] == by_adapter and float(said[-1][0]) == pytest.approx(float(said[1][0]), 1e-2)


@pytest.mark.parametrize(("given", "words"), [
    ("style", "write name=value"), ("style=True", r"has 'style=True'; write it as JSON, true"),
    ("style=FALSE", r"has 'style=FALSE'; write it as JSON, false"), ("style=none", "write it as JSON, null"),
    ("stile=1", "does not read 'stile'; did you mean 'style'")])
def test_a_wrong_flag_ends_in_one_line(styled, tmp_path, capsys, given, words):
    pytest.importorskip("tyro")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "Hello"}\n')
    with pytest.raises(SystemExit) as ended:
        main(["train", str(styled), str(data), "--chat-template-kwargs", given, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and not (tmp_path / "run").exists()
