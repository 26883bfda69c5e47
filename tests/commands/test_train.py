"""minitune train: its run folder, its flags' conflicts, a dry run that writes nothing, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tyro")
import minitune as mt
from minitune.commands.train import Train
from minitune.config import Data, LoRA, Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    mt.init("tiny", folder, tokenizer=Path(mt.__file__).parent / "examples" / "base", seed=1)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Number {i} is", "completion": f" {i * i}."}) + "\n"
                            for i in range(30)))
    return path


def command(folder, data, out, **flags):
    training = Training(**{"tokens": 64, "max_steps": 2, **flags.pop("training", {})})
    return Train(**{"base": folder, "data": data, "out": out, "device": "cpu", "max_new_tokens": 3,
                    "training": training, **flags})


def test_a_run_says_and_keeps_what_it_did(folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    command(folder, data, out, samples=Data(valid_split=4), lora=LoRA(rank=2), ask=("Number 7 is",)).run()
    printed = capsys.readouterr()
    assert "Number 7 is" in printed.out and "before" in printed.out
    assert printed.out.splitlines()[-1].endswith(f"adapter in {out / 'adapter'}, the best one in "
                                                 f"{out / 'adapter-best'}")
    assert "Where the tokens go" in printed.err and "before training: validation loss" in printed.err
    config = json.loads((out / "config.json").read_text())
    assert config["samples"]["valid_split"] == 4 and config["ask"] == ["Number 7 is"] and config["quant"] is None
    assert [source["samples"] for source in config["valid"]] == [4] and config["data"][0]["file"] == str(data)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [a["step"] for a in answers] == [0, 2]


def test_a_validation_file_and_names_of_fields(folder, data, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text('{"q": "Number 99 is", "a": " 9801."}\n')
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text('{"q": "Number 3 is", "a": " 9."}\n')
    samples = Data(field_map=("prompt=q", "completion=a"), valid=str(held))
    command(folder, theirs, tmp_path / "run", samples=samples).run()
    assert "Number 3 is" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "valid_loss" in m] == [0, 1, 2]


def test_base_weights_instead_of_an_adapter(folder, data, tmp_path, capsys):
    command(folder, data, tmp_path / "run", train=("norms",)).run()
    assert f"model in {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    mt.load(tmp_path / "run" / "model", device="cpu")


def test_a_dry_run_writes_nothing(folder, data, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    command(folder, data, tmp_path / "run", dry_run=True).run()
    assert "nothing is written" in capsys.readouterr().out and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("flags", "message"), [
    ({"training": {"evaluate_every": 2}, "ask": ()}, None), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"ask": ("",)}, "ask has ''"),
    ({"samples": Data(valid="untrained.jsonl")}, "no trained token|nothing to train on"),
    ({"texts": True, "training": {"evaluate_every": 2}}, "there is nothing to evaluate")])
def test_a_dry_run_refuses_what_the_run_does(folder, data, tmp_path, monkeypatch, flags, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "untrained.jsonl").write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    flags = dict(flags)
    if flags.pop("texts", False):
        data.write_text('{"text": "no question in it"}\n')
    before = set(tmp_path.iterdir())
    said = []
    for dry in (True, False) if message else (True,):
        try:
            command(folder, data, tmp_path / "run", dry_run=dry, **flags).run()
        except mt.InputError as error:
            said.append(str(error))
    assert set(tmp_path.iterdir()) == before
    if message is None:         # the questions of the data can be asked
        assert not said and "nothing is written" in capsys.readouterr().out
    else:
        assert len(said) == 2 and said[0] == said[1] and re.search(message, said[0])


@pytest.mark.parametrize(("flags", "message"), [
    ({"adapter": Path("a"), "lora": LoRA(rank=3)}, "--adapter brings its own rank"),
    ({"train": ("full",), "lora": LoRA(rank=3)}, "--train has no adapter"),
    ({"train": ("ful",)}, "'ful' is not known"), ({"out": Path(__file__).parent}, "exists already"),
    ({"samples": Data(valid="nowhere.jsonl")}, "nowhere.jsonl"),
    ({"train": ("full",), "quant": "nf4"}, "4 bits cannot be trained")])
def test_what_does_not_go_together_is_refused(folder, data, tmp_path, flags, message):
    before = set(tmp_path.iterdir())
    with pytest.raises(mt.InputError, match=message):
        command(folder, data, **{"out": tmp_path / "run", **flags}).run()
    assert set(tmp_path.iterdir()) == before


def test_tensorboard_that_is_not_installed_is_named_first(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(mt.InputError, match="pip install"):
        command(Path("nowhere"), Path("nowhere"), tmp_path / "run", tensorboard=True).run()


def test_ctrl_c_saves_the_adapter_and_ends_with_130(folder, data, tmp_path):
    out = tmp_path / "run"
    run = subprocess.Popen([sys.executable, "-m", "minitune", "train", str(folder), str(data), "--out", str(out),
                            "--tokens", "64", "--max-steps", "100000", "--max-new-tokens", "1", "--device", "cpu"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert run.poll() is None and time.monotonic() < deadline, "no step was done"
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in said
    assert f"what was trained is saved in {out / 'adapter'}" in said.splitlines()[-1]
    assert mt.load(folder, adapter=out / "adapter", device="cpu").complete("Number 3 is", 2) is not None
    assert (out / "loss.png").exists() and not (out / "adapter-best").exists()


def _hear_ctrl_c():
    """A shell's background process ignores it, and so would whatever that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
