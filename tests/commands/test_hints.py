"""What the commands say beside their result: hints before the first step, and in what dtype a merge was written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("tyro")
import minitune as mt
from minitune.checkpoint.reader import Checkpoint
from minitune.cli import main
from tests.files import EXAMPLES, write_numbers


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(20))


def test_train_and_its_dry_run_say_that_the_steps_are_few(tiny, data, tmp_path, capsys):
    flags = ["train", str(tiny), str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--max-new-tokens", "1"]
    notes = ["note: only 1 optimizer step, in which hardly anything is learned; fewer tokens a row or more epochs make "
             "more (tokens is 1,024, epochs 1)"]
    main([*flags, "--tokens", "1024", "--dry-run"])
    assert capsys.readouterr().out.splitlines()[-1:] == notes
    main([*flags, "--tokens", "1024"])
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("note: ")] == notes
    assert said.index(notes[0]) < next(i for i, line in enumerate(said) if line.startswith("step 1/1"))


def test_a_rate_that_wrecks_the_model_is_said_once_and_in_the_summary(data, tmp_path, capsys):
    main(["train", str(EXAMPLES / "base"), str(data), "--out", str(tmp_path / "run"), "--device", "cpu", "--tokens",
          "32", "--epochs", "3", "--lr", "50", "--clip", "0", "--max-new-tokens", "1"])
    said = capsys.readouterr().err
    assert said.count("diverging: the median loss of the last ") == 1 and "with a lower lr (it is 50)" in said
    assert "; diverging since step " in said.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_says_the_dtype_that_it_wrote(tiny, tmp_path, capsys, dtype):
    mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2)).save_adapter(tmp_path / "adapter")
    out = tmp_path / "merged"
    main(["merge", str(tiny), str(tmp_path / "adapter"), str(out), "--device", "cpu", "--dtype", dtype])
    assert capsys.readouterr().out == f"merged model in {out}, weights in bfloat16, as the base's own\n"
    with Checkpoint.open(out) as written:
        assert {written.info(name).dtype for name in written.names()} == {torch.bfloat16}


@pytest.mark.parametrize("args", [["complete", "run", "a"], ["chat", "run"], ["train", "run", "d"],
                                  ["inspect", "run", "d"], ["doctor", "run"], ["evaluate", "run", "d"],
                                  ["merge", "run", "a", "out"]])
def test_a_runs_folder_is_no_model_for_any_command(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"model": {"path": "base"}, "quant": "nf4"}')
    (tmp_path / "run" / "environment.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("minitune: run: is the folder of a run, no model: its base is base, quant nf4; "
                                       "give that here, and run/adapter as the adapter\n")


def test_a_warning_is_one_line_of_the_command(tiny, tmp_path):
    mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2), quant="nf4").save_adapter(tmp_path)
    done = subprocess.run([sys.executable, "-m", "minitune", "complete", str(tiny), "a", "--adapter", str(tmp_path),
                           "--max-new-tokens", "1", "--device", "cpu"], capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"minitune: warning: {tmp_path}: was trained on a base in nf4, and this one lies in ")
    assert done.stderr.count("\n") == 1
