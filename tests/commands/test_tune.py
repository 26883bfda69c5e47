"""minitune tune: a table that training then reads; without a GPU, and for a wrong number, one line."""

import pytest
import torch

import minitune as mt

pytest.importorskip("tyro")
from minitune.cli import main
from tests.oracles import make


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


@pytest.mark.parametrize(("flag", "value"), [("tokens", "-1"), ("longest", "0"), ("rank", "0")])
def test_a_number_that_is_none_is_named(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "tiny", f"--{flag}", value])
    assert ended.value.code == 2 and f"{flag} is {value}" in capsys.readouterr().err
