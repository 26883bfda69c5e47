"""The command line from end to end on a tiny checkpoint, and exit code 2 with one line for every user error."""

import json
import os
import subprocess
import sys

import pytest
import torch

import minitune as mt
from minitune.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    main(["init", "tiny", str(folder), "--seed", "1"])
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Number {i} is", "completion": f" {i * i}."}) + "\n"
                            for i in range(12)))
    return path


def test_init_train_complete(folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", str(folder), str(data), "--out", str(out), "--tokens", "64", "--epochs", "2", "--rank", "2",
          "--lr", "1e-2", "--targets", "q_proj", "v_proj", "--max-new-tokens", "5", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "Number 0 is" in printed and "Number 2 is" in printed and "adapter in" in printed
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and set(config["target_modules"]) == {"q_proj", "v_proj"}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in record for record in records) >= 2 and (out / "loss.png").stat().st_size > 5000
    main(["complete", str(folder), "Number 3 is", "--adapter", str(out / "adapter"), "--max-new-tokens", "5",
          "--device", "cpu"])
    answer = capsys.readouterr().out
    expected = mt.load(folder, adapter=out / "adapter", device="cpu").complete("Number 3 is", 5)
    assert answer == expected + "\n"


def test_training_goes_on_from_an_adapter(folder, data, tmp_path):
    flags = ["--tokens", "64", "--max-steps", "2", "--device", "cpu", "--max-new-tokens", "1"]
    main(["train", str(folder), str(data), "--out", str(tmp_path / "a"), "--rank", "3", *flags])
    first = str(tmp_path / "a" / "adapter")
    main(["train", str(folder), str(data), "--out", str(tmp_path / "b"), "--adapter", first, *flags])
    assert json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())["r"] == 3


def test_training_in_4_bits_and_merging(folder, data, tmp_path, capsys):
    flags = ["--device", "cpu", "--quant", "nf4-dq"]
    main(["train", str(folder), str(data), "--out", str(tmp_path / "run"), "--tokens", "64", "--max-steps", "4",
          "--lr", "1e-2", "--max-new-tokens", "1", "--dtype", "float32", *flags])
    adapter = str(tmp_path / "run" / "adapter")
    capsys.readouterr()
    for onto in ("loaded", "original"):
        main(["merge", str(folder), adapter, str(tmp_path / onto), "--onto", onto, "--data", str(data), "--tokens",
              "64", "--dtype", "float32", *flags])
        losses = [float(line.split()[1].rstrip(":")) for line in capsys.readouterr().out.splitlines()
                  if line.startswith("loss")]
        on_loaded, on_original, merged = losses
        own, other = (on_loaded, on_original) if onto == "loaded" else (on_original, on_loaded)
        assert abs(merged - own) < 0.2 * abs(own - other) + 1e-4
        assert mt.load(tmp_path / onto, device="cpu").tokenizer.encode("a")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(folder), adapter, str(tmp_path / "loaded")])
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err


def _bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    return str(path)


ERRORS = {
    "no folder": (lambda f, d, t: ["train", "nowhere", d], "nowhere"),
    "no data": (lambda f, d, t: ["train", f, "nowhere.jsonl"], "nowhere.jsonl"),
    "bad line": (lambda f, d, t: ["train", f, _bad_line(t, "{")], "bad.jsonl:2"),
    "bad field": (lambda f, d, t: ["train", f, _bad_line(t, '{"promt": "a", "completion": "b"}')], "promt"),
    "nan": (lambda f, d, t: ["train", f, d, "--lr", "nan"], "lr"),
    "negative": (lambda f, d, t: ["train", f, d, "--lr", "-1"], "lr"),
    "target": (lambda f, d, t: ["train", f, d, "--targets", "q_prj"], "q_prj"),
    "long document": (lambda f, d, t: ["train", f, d, "--tokens", "4"], "data.jsonl:1"),
    "out exists": (lambda f, d, t: ["train", f, d, "--out", f], "exists"),
    "shape": (lambda f, d, t: ["init", "lama-2-7b", str(t / "new")], "llama-2-7b"),
    "seed": (lambda f, d, t: ["train", f, d, "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
    "tokens": (lambda f, d, t: ["train", f, d, "--tokens", "3000000000"], "tokens is 3000000000"),
    "answer": (lambda f, d, t: ["complete", f, "x", "--max-new-tokens", "99999999999"], "max_new_tokens is 999999"),
    "draw": (lambda f, d, t: ["complete", f, "x", "--temperature", "1", "--seed", "99999999999999999999"], "seed is"),
    "device": (lambda f, d, t: ["complete", f, "x", "--device", "meta"], "'meta' is not one"),
    "adapter": (lambda f, d, t: ["complete", f, "x", "--adapter", str(t / "empty")], "adapter_config.json"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors_end_in_one_line_and_exit_code_2(case, folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make, word = ERRORS[case]
    arguments = make(str(folder), str(data), tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("minitune: ") and word in message and "Traceback" not in captured.err
    assert set(tmp_path.iterdir()) == before, "something was written"


@pytest.mark.parametrize("args", [["tran"], ["train"], ["train", "a", "b", "--rnk", "8"],
                                  ["train", "a", "b", "--rank", "x"]])
def test_wrong_flags_exit_with_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2


def test_too_little_memory_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("minitune.commands.complete.load", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(SystemExit) as stop:
        main(["complete", "base", "text"])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and message.startswith("minitune: out of memory: ") and " GB more" in message


def test_a_library_that_is_not_installed_is_named():
    code = ("import runpy, sys; sys.modules['tyro'] = None; sys.argv = ['minitune', '--help']; "
            "runpy.run_module('minitune', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == (
        "minitune: the command line needs tyro, which is not installed; say: pip install tyro\n")


def test_python_dash_m_is_the_command_line():
    environment = os.environ | {"COLUMNS": "100"}
    text = subprocess.run([sys.executable, "-m", "minitune", "--help"], check=True, capture_output=True, text=True,
                          env=environment).stdout
    assert all(command in text for command in ("train", "complete", "init", "demo"))
