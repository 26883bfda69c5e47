"""--dry-run: what is said before the first step is what the run then has, and nothing is written."""

import json

import pytest

import minitune as mt

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.commands import dry_run
from minitune.commands.dry_run import plan
from minitune.config import Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry") / "tiny"
    main(["init", "tiny", str(folder), "--seed", "1"])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Number {i} is", "completion": f" {i * i}."}) + "\n"
                            for i in range(20)))
    return path


def _load(folder, data, training, **settings):
    model = mt.load(folder, device="cpu", dtype="float32", **{"lora": mt.LoRA(rank=4), **settings})
    return model, mt.data.stream(data, model.tokenizer, tokens=training.tokens, epochs=training.epochs,
                                 seed=training.seed)


@pytest.mark.parametrize("settings", [{"epochs": 3, "micro_batches": 2}, {"max_steps": 3}])
def test_the_plan_is_what_the_run_then_has(settings, folder, data):
    training = Training(tokens=64, **settings)
    model, batches = _load(folder, data, training)
    rows = dict(plan(model, batches, training))
    assert model.training and not any(p.grad is not None for p in model.trainable_parameters())
    run = mt.train(model, batches, training=training)
    assert rows["steps"].startswith(f"{run.info.total_steps} of {training.micro_batches} x 64 tokens")
    assert len(run.records) == run.info.total_steps
    assert rows["trained"].startswith(f"{run.info.n_parameters:,} parameters")
    assert rows["data"] == f"20 documents, {batches.n_tokens:,} tokens, {batches.n_trained:,} of them trained"


def test_the_loss_is_that_of_the_first_step(folder, data):
    training = Training(tokens=64, max_steps=1)
    model, batches = _load(folder, data, training, lora=mt.LoRA(rank=4, dropout=0.5))
    before = float(dict(plan(model, batches, training))["loss of the first row"])
    assert abs(mt.train(model, batches, training=training).records[0].loss - before) < 1e-3     # B is zero at the start


def _bytes(text):
    number, unit = text.split()[:2]
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def test_the_bytes_are_those_of_weights_and_moments(folder, data):
    sizes = {}
    for quant in (None, "nf4"):
        model, batches = _load(folder, data, Training(tokens=64), quant=quant)
        n = sum(p.numel() for p in model.trainable_parameters())
        for moments, each in (("fp32", 12), ("8bit", 6)):
            training = Training(tokens=64, moments=moments)
            assert abs(_bytes(dict(plan(model, batches, training))["gradients and moments"]) - each * n) < 1e5
        sizes[quant] = _bytes(dict(plan(model, batches, Training(tokens=64)))["memory: weights, loaded"])
        if quant is None:
            assert abs(sizes[quant] - sum(p.nbytes for p in model.parameters())) < 1e5
    assert sizes["nf4"] < 0.8 * sizes[None]


def test_the_ledgers_stand_before_the_plan(folder, data, capsys):
    model, batches = _load(folder, data, Training(tokens=64))
    dry_run.show(model, batches, batches, Training(tokens=64))
    text = capsys.readouterr().out
    assert text.index("filler") < text.index("Held out") < text.index("What would be trained")
    assert f"{batches.n_trained:,}" in text


def test_what_does_not_fit_is_said(folder, data, monkeypatch):
    model, batches = _load(folder, data, Training(tokens=64))
    assert "fit" not in dict(plan(model, batches, Training(tokens=64)))["to come, beside free"]
    monkeypatch.setattr(dry_run, "free_bytes", lambda _: 1000)
    assert "it does not fit" in dict(plan(model, batches, Training(tokens=64)))["to come, beside free"]


def test_data_without_a_trained_token_is_refused(folder, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a few words"}\n')
    model, batches = _load(folder, path, Training(tokens=64))
    batches.epoch = lambda _: iter(())
    with pytest.raises(mt.InputError, match="no trained token"):
        plan(model, batches, Training(tokens=64))


def test_the_flag_writes_nothing(folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minitune.data.cache.MIN_FILE", 10)
    main(["train", str(folder), str(data), "--dry-run", "--tokens", "64", "--device", "cpu", "--valid-split", "2"])
    printed = capsys.readouterr().out
    assert "155,648 parameters" in printed and "loss of the first row" in printed
    assert "an epoch: 18 samples" in printed and "Held out" in printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["train", str(folder), str(data), "--dry-run", "--tokens", "4", "--device", "cpu"])
    assert ended.value.code == 2 and "data.jsonl:1" in capsys.readouterr().err and not list(tmp_path.iterdir())
