"""minitune train: its run folder, its flags' conflicts, a dry run that writes nothing, and Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("tyro")
import minitune as mt
from minitune.cli import main
from minitune.commands.train import Train, show_plan
from minitune.config import Data, LoRA, Training
from tests.files import records, write_numbers


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(30))


def command(folder, data, out, **flags):
    training = Training(**{"tokens": 64, "max_steps": 2, **flags.pop("training", {})})
    return Train(**{"base": folder, "data": data, "out": out, "device": "cpu", "max_new_tokens": 3,
                    "training": training, **flags})


def test_a_run_says_and_keeps_what_it_did(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    command(tiny, data, out, samples=Data(valid_split=4), lora=LoRA(rank=2), ask=("Number 7 is",)).run()
    printed = capsys.readouterr()
    assert "Number 7 is" in printed.out and "before" in printed.out
    assert printed.out.splitlines()[-1].endswith(f"adapter in {out / 'adapter'}, the best one in "
                                                 f"{out / 'adapter-best'}")
    assert "Where the tokens go" in printed.err and "before training: validation loss" in printed.err
    config = json.loads((out / "config.json").read_text())
    assert config["samples"]["valid_split"] == 4 and config["ask"] == ["Number 7 is"] and config["quant"] is None
    assert [source["samples"] for source in config["valid"]] == [4] and config["data"][0]["file"] == str(data)
    assert [answer["step"] for answer in records(out / "answers.jsonl")] == [0, 2]


def test_a_validation_file_and_names_of_fields(tiny, data, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text('{"q": "Number 99 is", "a": " 9801."}\n')
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text('{"q": "Number 3 is", "a": " 9."}\n')
    samples = Data(field_map=("prompt=q", "completion=a"), valid=str(held))
    command(tiny, theirs, tmp_path / "run", samples=samples).run()
    assert "Number 3 is" in capsys.readouterr().out
    metrics = records(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics if "valid_loss" in m] == [0, 1, 2]


def test_a_file_of_settings_stands_under_the_flags(tiny, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(f"""
base = {str(tiny)!r}
data = "data.jsonl"
max_new_tokens = 1
device = "cpu"
[lora]
rank = 2
targets = ["q_proj"]
[training]
tokens = 64
max_steps = 2
""")
    main(["train", "--config", "run.toml", "--out", "mine", "--rank", "3"])
    config = json.loads((tmp_path / "mine" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("empty", ["[]", "['']"])
def test_an_empty_train_in_a_file_is_no_adapters_training(tiny, data, tmp_path, monkeypatch, capsys, empty):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(f"base = {str(tiny)!r}\ndata = 'data.jsonl'\ntrain = {empty}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", "run.toml", "--out", "mine", "--device", "cpu"])
    assert 'train is empty; name what is to be trained ("full"' in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.fixture
def biased(tiny, tmp_path):
    """The tiny checkpoint with biases of zero at attention's linears."""
    folder = shutil.copytree(tiny, tmp_path / "biased")
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("weight", "bias"): weight.new_zeros(len(weight)) for name, weight in weights.items()
                if "self_attn" in name and name.endswith("_proj.weight")}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return folder


@pytest.mark.parametrize(("train", "given", "warned"), [
    (["full"], [], True), (["*.0.mlp.up_proj.weight"], [], True), (["full"], ["--lr", "2e-5"], False),
    (["norms"], [], False), (["*_proj.bias"], [], False), (None, [], False)])
def test_the_default_lr_is_warned_of_where_whole_linears_are_trained(biased, data, tmp_path, recwarn, train, given,
                                                                     warned):
    chosen = [] if train is None else ["--train", *train]
    main(["train", str(biased), str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--tokens",
          "64", "--dry-run", *chosen, *given])
    assert any("lr is 0.0002, the default, which is made for adapters" in str(w.message) for w in recwarn) == warned


def test_training_goes_on_from_an_adapter(tiny, data, tmp_path):
    command(tiny, data, tmp_path / "a", lora=LoRA(rank=3), max_new_tokens=1).run()
    command(tiny, data, tmp_path / "b", adapter=tmp_path / "a" / "adapter", max_new_tokens=1).run()
    assert json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())["r"] == 3


def test_base_weights_instead_of_an_adapter(tiny, data, tmp_path, capsys):
    command(tiny, data, tmp_path / "run", train=("norms",)).run()
    assert f"model in {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    mt.load(tmp_path / "run" / "model", device="cpu")


def test_the_ledgers_stand_before_the_plan(tiny, data, capsys):
    model = mt.load(tiny, device="cpu", dtype="float32", lora=LoRA(rank=4))
    batches = mt.data.stream(data, model.tokenizer, tokens=64)
    show_plan(model, batches, batches, Training(tokens=64))
    text = capsys.readouterr().out
    assert text.index("filler") < text.index("Held out") < text.index("What would be trained")
    assert f"{batches.n_trained:,}" in text


def test_a_dry_run_writes_nothing(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minitune.data.cache.MIN_FILE", 10)
    main(["train", str(tiny), str(data), "--dry-run", "--tokens", "64", "--device", "cpu", "--valid-split", "2"])
    printed = capsys.readouterr().out
    assert "155,648 parameters" in printed and "loss of the first row" in printed and "nothing is written" in printed
    assert "an epoch: 28 samples" in printed and "Held out" in printed
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny), str(data), "--dry-run", "--tokens", "4", "--device", "cpu"])
    assert ended.value.code == 2 and "data.jsonl:1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(("flags", "message"), [
    ({"training": {"evaluate_every": 2}, "ask": ()}, None), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"ask": ("",)}, "ask has ''"),
    ({"samples": Data(valid="untrained.jsonl")}, "no trained token|nothing to train on"),
    ({"texts": True, "training": {"evaluate_every": 2}}, "there is nothing to evaluate")])
def test_a_dry_run_refuses_what_the_run_does(tiny, data, tmp_path, monkeypatch, flags, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "untrained.jsonl").write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    flags = dict(flags)
    if flags.pop("texts", False):
        data.write_text('{"text": "no question in it"}\n')
    before = set(tmp_path.iterdir())
    said = []
    for dry in (True, False) if message else (True,):
        try:
            command(tiny, data, tmp_path / "run", dry_run=dry, **flags).run()
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
def test_what_does_not_go_together_is_refused(tiny, data, tmp_path, flags, message):
    before = set(tmp_path.iterdir())
    with pytest.raises(mt.InputError, match=message):
        command(tiny, data, **{"out": tmp_path / "run", **flags}).run()
    assert set(tmp_path.iterdir()) == before


def test_tensorboard_that_is_not_installed_is_named_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(mt.InputError, match="pip install"):
        command(Path("nowhere"), Path("nowhere"), tmp_path / "run", tensorboard=True).run()


def test_ctrl_c_saves_the_adapter_and_ends_with_130(tiny, data, tmp_path):
    out = tmp_path / "run"
    run = subprocess.Popen([sys.executable, "-m", "minitune", "train", str(tiny), str(data), "--out", str(out),
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
    summary, how = said.splitlines()[-2:]
    assert f"what was trained is saved in {out / 'adapter'}" in summary
    assert how == f"to go on: minitune train --resume --out {out}"
    assert mt.load(tiny, adapter=out / "adapter", device="cpu").complete("Number 3 is", 2) is not None
    assert (out / "loss.png").exists() and not (out / "adapter-best").exists()


def _hear_ctrl_c():
    """A shell's background process ignores it, and so would whatever that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
