"""doctor and tune from the command line."""

import tomllib
from pathlib import Path

import pytest
import torch

import minitune as mt
from minitune import doctor
from minitune.ops import swiglu

pytest.importorskip("tyro")
from minitune.cli import main
from tests.oracles import make


def test_doctor_says_what_is_there_and_that_all_is_right(capsys):
    main(["doctor", "--device", "cpu", "--tokens", "20"])
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    for word in ("native", "triton", "rms_norm", "attention", "dB", "right"):
        assert word in printed


def test_doctor_takes_a_folder_and_ends_with_1_if_an_op_is_wrong(tmp_path, monkeypatch, capsys):
    make("qwen3", tmp_path)
    right = swiglu.forward
    monkeypatch.setattr(swiglu, "forward", lambda gate_up, out=None: right(gate_up) * 1.1)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path), "--device", "cpu", "--tokens", "20"])
    assert ended.value.code == 1 and "WRONG" in capsys.readouterr().out


def test_a_wrong_name_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "lama-2-7b"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("minitune: doctor: there is no folder 'lama-2-7b', and no shape")
    assert "did you mean 'llama-2-7b'?" in said


def test_a_folder_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "models/nowhere"])
    assert ended.value.code == 2
    assert "doctor: there is no folder 'models/nowhere', and no shape is named" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_tune_without_a_gpu_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "llama-2-7b"])
    assert ended.value.code == 2 and "nothing to choose without a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_tune_writes_a_table_that_training_then_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINITUNE_TUNED", str(tmp_path / "tuned.json"))
    make("llama-2-gqa", tmp_path / "base")
    main(["tune", str(tmp_path / "base"), "--tokens", "256", "--longest", "64", "--rank", "4"])
    assert "attention" in capsys.readouterr().out
    model = mt.load(tmp_path / "base", lora=mt.LoRA(rank=4))
    batch = mt.data.pack([[5, 6, 7, 8] * 10], 64)[0]
    model.loss(batch).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.trainable_parameters())


def test_doctor_says_why_there_is_no_gpu_and_what_else_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in doctor.gpu()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "no NVIDIA GPU, or no driver" in doctor.gpu()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    rows = dict(doctor.machine(torch.device("cpu"), torch.float32))
    assert rows["Parquet files"] == "not installed: pip install 'minitune[parquet]'"
    assert rows["minitune runs on"] == "cpu, computing in float32" and " GB on cpu" in rows["free memory"]
    assert {extra for _, extra in doctor.EXTRAS.values()} <= _extras()


def _extras():
    root = Path(__file__).parents[1]
    return set(tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])


@pytest.mark.parametrize("args", [["doctor", "--tokens", "0"], ["doctor", "--tokens", "-5"],
                                  ["tune", "tiny", "--tokens", "-1"], ["tune", "tiny", "--longest", "0"],
                                  ["tune", "tiny", "--rank", "0"]])
def test_a_number_that_is_none_is_named(args, capsys):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2 and f"{args[-2][2:]} is {args[-1]}" in capsys.readouterr().err
