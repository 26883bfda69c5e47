"""minitune bench: whole steps of a folder's model, or of a shape, as a table and a raw file; no other file."""

import json

import pytest

import minitune as mt
from minitune.bench import LEAST, Setting, bench

pytest.importorskip("tyro")
from minitune.cli import main

SMALL = ["--tokens", "64", "--seconds", "0.05", "--device", "cpu"]


@pytest.mark.parametrize("flags", [[], ["--quant", "nf4-dq", "--longest", "24"], ["--quant", "nf4", "--dtype",
                                   "float32"], ["--train", "norms", "--micro-batches", "2", "--moments", "8bit"]])
def test_a_shape_is_measured_without_a_file(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    main(["bench", "tiny", *SMALL, *flags, "--out", "raw.json"])
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"] and said.endswith("every step in raw.json\n")
    raw = json.loads((tmp_path / "raw.json").read_text())
    rows = 2 if "--micro-batches" in flags else 1
    assert f"{rows} x 64 tokens in documents of {24 if '--longest' in flags else 64}; memory keep" in said
    assert raw["setting"]["rank"] == (None if "--train" in flags else 16)
    assert raw["setting"]["base"] == "tiny" and raw["model"]["d_model"] == 128
    seconds = sorted(step["seconds"] for step in raw["steps"][1:])
    assert len(seconds) >= LEAST and all(step["n_tokens"] == 64 * rows for step in raw["steps"])
    assert all(step["flops"] > 0 and step["grad_norm"] > 0 and not step["left_out"] for step in raw["steps"])
    middle = (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2
    assert f"{middle:.4g} (" in said
    assert ("1,152 parameters (base weights norm; " if "--train" in flags else "155,648 parameters, by") in said
    assert ("nf4" in said) == ("--quant" in flags)


def test_a_folder_is_measured_as_it_lies_and_stays(tiny, tmp_path, capsys):
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    main(["bench", str(tiny), *SMALL, "--rank", "4"])
    said = capsys.readouterr().out
    model = mt.load(tiny, lora=mt.LoRA(rank=4), device="cpu")
    assert f"{sum(p.numel() for p in model.trainable_parameters()):,} parameters" in said and str(tiny) in said
    assert {path: path.read_bytes() for path in tiny.iterdir()} == before


def test_documents_are_no_longer_than_the_model_reads(tmp_path, monkeypatch, recwarn, capsys):
    monkeypatch.chdir(tmp_path)
    mt.init("tiny", "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    main(["bench", "base", *SMALL])
    assert "1 x 64 tokens in documents of 40" in capsys.readouterr().out
    assert not [each for each in recwarn if "longer than" in str(each.message)]


@pytest.mark.parametrize(("flags", "words"), [
    (["--tokens", "1"], "tokens is 1; it must be a whole number from 2"), (["--seconds", "0"], "seconds is 0.0; it"),
    (["--longest", "65"], "longest is 65; it must be at most tokens (64)"), (["--longest", "1"], "longest is 1; it mu"),
    (["--rank", "0"], "rank is 0"), (["--micro-batches", "0"], "micro_batches is 0"), (["--out", "here"], "here exist"),
    (["--out", "here/raw.json"], "/here is no folder"), (["--rank", "4", "--train", "full"], "has no adapter; leave"),
    (["--train", "heads"], "'heads'"), (["--quant", "nf4", "--train", "full"], "4 bits cannot be trained")])
def test_what_cannot_be_measured_is_named(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "tiny", *SMALL, *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_an_empty_base_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "", *SMALL])
    assert "bench: base is empty" in capsys.readouterr().err


def test_neither_a_folder_nor_a_shape_is_named():
    setting = Setting(base="tinny", tokens=64, longest=None, micro_batches=1, seconds=0.1, rank=None, train=(),
                      quant=None, memory="auto", moments="fp32")
    with pytest.raises(mt.InputError, match=r"^bench: there is no folder 'tinny', and no shape is named 'tinny'; "):
        bench(setting, "cpu", None, None)
