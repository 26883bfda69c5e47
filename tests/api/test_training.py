"""mt.train with a run folder, validation data and questions: what is written, kept and refused."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import minitune as mt
from minitune.data.batch import GRAIN
from minitune.objectives import sft
from minitune.objectives.evaluate import evaluate
from minitune.report.progress import ProgressLines
from minitune.training.run import Observer
from tests.files import records, write_numbers, write_tiny


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(20))


def model(folder, **how):
    return mt.load(folder, device="cpu", dtype="float32", **(how or {"lora": mt.LoRA(rank=2)}))


def test_a_run_folder_holds_all_and_the_best_is_the_best(tiny, data, tmp_path):
    valid, out = write_numbers(tmp_path / "valid.jsonl", range(20, 26)), tmp_path / "run"
    trained = model(tiny)
    run = mt.train(trained, data, valid=valid, out=out, tokens=64, epochs=3, lr=2e-2, evaluate_every=4,
                   max_new_tokens=4, config={"purpose": "a test"})
    assert {p.name for p in out.iterdir()} == {"adapter", "adapter-best", "answers.jsonl", "config.json", "loss.png",
                                               "environment.json", "ledger.json", "metrics.jsonl"}
    total = run.info.total_steps
    assert [e.step for e in run.evaluations] == [0, *range(4, total, 4), total]
    answers = records(out / "answers.jsonl")
    assert [a["question"] for a in answers[:3]] == ["Number 0 is", "Number 1 is", "Number 2 is"]
    assert len(answers) == 3 * len(run.evaluations)
    last = mt.load(tiny, adapter=out / "adapter", device="cpu", dtype="float32")
    assert last.complete("Number 0 is", 4) == answers[-3]["answer"]
    assert model(tiny).complete("Number 0 is", 4) == answers[0]["answer"]
    best = mt.load(tiny, adapter=run.best_adapter, device="cpu", dtype="float32")
    found = evaluate(best, mt.data.stream(valid, best.tokenizer, tokens=64, shuffle=False))
    assert found.loss == pytest.approx(run.best.loss, rel=1e-6) and run.best.loss == min(
        e.loss for e in run.evaluations[1:])
    config = json.loads((out / "config.json").read_text())
    assert config["ask"] == ["Number 0 is", "Number 1 is", "Number 2 is"] and config["max_new_tokens"] == 4
    assert (config["adapter"], config["quant"], config["add_tokens"]) == (None, None, [])
    assert (config["model"]["memory"], config["model"]["memory_taken"]) == ("auto", "keep")
    assert config["lora"]["rank"] == 2 and config["training"]["lr"] == 2e-2 and config["purpose"] == "a test"
    assert config["data"] == str(data) and config["valid"] == str(valid) and config["model"]["path"] == str(tiny)
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["train"]["sources"][0]["samples"] == 20 and ledger["valid"]["sources"][0]["samples"] == 6
    metrics = records(out / "metrics.jsonl")
    assert sum("loss" in m for m in metrics) == total and metrics[1]["flops"] > 0 and metrics[1]["memory"] > 1e7


def test_train_lowers_the_loss_and_repeats_bit_for_bit(tiny, data, tmp_path):
    runs = []
    for place in ("a", "b"):
        model = mt.load(tiny, lora=mt.LoRA(rank=4), device="cpu")
        run = mt.train(model, data, tokens=128, epochs=12, lr=3e-3, micro_batches=2)
        model.save_adapter(tmp_path / place)
        runs.append(run)
    assert runs[0].final_loss < runs[0].records[0].loss - 0.2
    assert [r.loss for r in runs[0].records] == [r.loss for r in runs[1].records]
    a, b = ((tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("a", "b"))
    assert a == b
    loaded = mt.load(tiny, adapter=tmp_path / "a", device="cpu")
    assert loaded.complete("Number 3 is", 8) == model.complete("Number 3 is", 8)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", [{"lora": mt.LoRA(rank=2, dora=True)}, {"lora": mt.LoRA(rank=2), "quant": "nf4-dq"},
                                 {"train": "full"}], ids=["DoRA", "QLoRA", "full"])
def test_torchs_default_dtype_changes_nothing(tiny, default, how):
    found = []
    rows = [{"text": f"Number {n} is a number", "weight": 0.3} for n in range(20)]
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            trained = mt.load(tiny, device="cpu", dtype="float32", **how)
            run = mt.train(trained, rows, tokens=64, lr=1e-3, moments="8bit", epochs=2, quiet=True)
            found.append([run.losses, trained.complete("Number 3", max_new_tokens=5),
                          {p.dtype for p in trained.trainable_parameters()}])
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] and found[1][2] == {torch.float32}


def test_without_gradients_nothing_begins(tiny, data, tmp_path):
    with torch.no_grad(), pytest.raises(mt.InputError, match="train: gradients are switched off here"):
        mt.train(model(tiny), data, tokens=64, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_on_the_disk_is_said_before_it_is_trained(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(total=9000, free=1000))
    of = r"\(adapter \S+ MB, the best so far, and the one that takes its place \S+ MB, two checkpoints \S+ MB\)"
    with pytest.raises(mt.InputError, match=rf"run: what is trained takes \S+ MB of disk {of}, and 0\.0 MB are free"):
        mt.train(model(tiny), data, tokens=64, out=tmp_path / "run", valid=data, save_every=1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_needs_no_room_for_what_lies_there_already(tiny, data, tmp_path, monkeypatch):
    class Impatient(Observer):
        def on_step(self, record):
            if record.step == 3:
                raise KeyboardInterrupt

    how = {"tokens": 64, "out": tmp_path / "run", "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        mt.train(model(tiny), data, observers=[Impatient()], **how)
    monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(total=9, free=0))
    assert mt.train(model(tiny), data, resume=True, **how).end == "finished"


def test_evaluating_and_asking_change_no_step(tiny, data):
    plain = mt.train(model(tiny, lora=mt.LoRA(rank=2, dropout=0.3)), data, tokens=64)
    watched = mt.train(model(tiny, lora=mt.LoRA(rank=2, dropout=0.3)), data, tokens=64, evaluate_every=1,
                       valid=data, ask=["Number 3 is", [{"role": "user", "content": "Hi"}]], max_new_tokens=2)
    assert plain.losses == watched.losses and plain.evaluations == []
    assert [a.question for a in watched.evaluations[0].answers] == ["Number 3 is", "Hi"]


def test_questions_are_asked_before_and_after_where_nothing_else_is_said(tiny, data):
    run = mt.train(model(tiny), data, valid=data, tokens=64, ask=["Number 3 is"], max_new_tokens=2)
    asked = [e.step for e in run.evaluations if e.answers]
    assert asked == [0, run.info.total_steps] and len(run.evaluations) > 2
    assert [e.step for e in mt.train(model(tiny), data, tokens=64, ask=["a"], max_new_tokens=1).evaluations] == asked


def test_ctrl_c_keeps_the_last_adapter(tiny, data, tmp_path):
    class Impatient(Observer):
        def on_step(self, record):
            if record.step == 3:
                raise KeyboardInterrupt

        def on_end(self, run):
            self.run = run

    trained, observer, out = model(tiny), Impatient(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as stopped:
        mt.train(trained, data, out=out, tokens=64, observers=[observer], ask=(), lr=1e-2)
    assert stopped.value.__notes__ == ["The run is kept as it was after step 3; resume goes on from there."]
    assert observer.run.end == "interrupted" and observer.run.adapter == out / "adapter"
    assert len(records(out / "metrics.jsonl")) == 3
    kept = mt.load(tiny, adapter=out / "adapter", device="cpu", dtype="float32")
    for name, adapter in trained.network.adapters().items():
        assert torch.equal(kept.network.adapters()[name].B, adapter.B) and adapter.B.any()


def test_trained_base_weights_are_saved_as_a_model(tiny, data, tmp_path):
    trained = model(tiny, train="norms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = mt.train(trained, data, out=tmp_path / "run", tokens=64, max_steps=2, ask=(), valid=data)
    assert run.adapter == tmp_path / "run" / "model" and (tmp_path / "run" / "model-best").is_dir()
    saved = mt.load(run.adapter, device="cpu", dtype="float32")
    assert saved.complete("Number 3 is", 4) == trained.complete("Number 3 is", 4)
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["trained_weights"]) == 9


def test_a_stream_brings_its_epochs(tiny, data):
    trained = model(tiny)
    stream = mt.data.stream(data, trained.tokenizer, tokens=64, epochs=2)
    run = mt.train(trained, stream)
    assert run.info.training.epochs == 2 and run.info.total_steps == len(stream)
    with pytest.raises(mt.InputError, match="the stream has epochs=2, the training epochs=3; set epochs in one place"):
        mt.train(trained, stream, epochs=3)
    with pytest.raises(mt.InputError, match="the stream has epochs=2, the training epochs=1; set epochs in one place"):
        mt.train(trained, stream, epochs=1)


def test_batches_are_valid_data_too_and_an_iterator_is_read_once(tiny, data):
    tokenizer = model(tiny).tokenizer
    batches = list(mt.data.stream(data, tokenizer, tokens=64))
    runs = [mt.train(model(tiny), batches, valid=valid) for valid in
            (batches, iter(batches), mt.data.stream(data, tokenizer, tokens=64, epochs=2))]
    first, second, third = ([e.loss for e in run.evaluations] for run in runs)
    assert first == second == pytest.approx(third, rel=1e-6) and len(first) > 2


def test_notes_on_the_data_are_said_though_nothing_is_shown(tiny, data, tmp_path):
    with pytest.warns(UserWarning, match="valid data: 20 samples: held out, but trained on as well"):
        mt.train(model(tiny), data, valid=data, tokens=64, max_steps=1)
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(data.read_text() * 2)
    with pytest.warns(UserWarning, match="train data: 20 samples: "):
        mt.train(model(tiny), doubled, tokens=64, max_steps=1, quiet=True)


def test_progress_is_shown_where_it_is_asked_for(tiny, data, capsys, monkeypatch):
    mt.train(model(tiny), data, tokens=64, max_steps=1)
    assert capsys.readouterr().err == ""
    mt.train(model(tiny), data, tokens=64, max_steps=1, quiet=False)
    shown = capsys.readouterr().err
    assert "Where the tokens go" in shown and "step 1/1" in shown and "of matrix rate" in shown
    monkeypatch.setattr("minitune.api.training.is_watched", lambda: True)
    monkeypatch.setattr("minitune.api.training.progress", lambda: ProgressLines(sys.stderr))
    mt.train(model(tiny), data, tokens=64, max_steps=1)
    assert "finished: 1 step" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ({"evaluate_every": 3}, "evaluate_every is 3, but there is nothing to evaluate"),
    ({"valid": 3}, "valid is 3; give the path"), ({"valid": []}, "the validation data has no trained token"),
    ({"out": 3}, "out is 3; give a path"), ({"ask": [3]}, "ask has 3; a question is a text"),
    ({"ask": [[{"role": "x", "content": "a"}]]}, "role"), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"out": "."}, "exists already"), ({"tokens": 3}, "data.jsonl:1")])
def test_misuse_is_refused_before_anything_is_written(tiny, data, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mt.InputError, match=message):
        mt.train(model(tiny), data, **{"out": tmp_path / "run", "ask": (), **arguments})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"ask": "Who?"}, "ask is 'Who[?]'; give a list"), ({"ask": 3}, "ask is 3; give a list"),
    ({"ask": [""]}, "ask has"),
    ({"ask": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]},
     "the question 'b' cannot be asked: chat: the last message is the assistant's"),
    ({"valid": [mt.data.pack([[5, 6, 10**6]], 8)[0]]}, "valid: batch 0 holds the token id 1000000; the vocabulary"),
    ({"data": [mt.data.pack([[5, 6, 10**6]], 8)[0]]}, "data: batch 0 holds the token id 1000000; the vocabulary"),
    ({"data": [mt.data.pack([([1, 5], [-100, -100])], 8)[0]]}, "the data has no trained token")])
def test_what_could_not_be_asked_or_measured_is_refused_before_anything_is_written(tiny, data, tmp_path, arguments,
                                                                                   message):
    arguments = {"data": data, "out": tmp_path / "run", "ask": (), "tokens": 64, **arguments}
    with pytest.raises(mt.InputError, match=message):
        mt.train(model(tiny), **arguments)
    assert not (tmp_path / "run").exists()


def test_a_question_needs_a_tokenizer_and_a_template_that_takes_it(data, tmp_path):
    mt.init("tiny", tmp_path / "bare", seed=1)
    batch = mt.data.pack([[5, 6, 7]], 8)
    with pytest.raises(mt.InputError, match=r"the question 'Hi' cannot be asked: .*no tokenizer"):
        mt.train(model(tmp_path / "bare"), batch, out=tmp_path / "run", ask=["Hi"])
    write_tiny(tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no chats here') }}")
    with pytest.raises(mt.InputError, match=r"the question 'Hi' cannot be asked: .*no chats here"):
        mt.train(model(tmp_path / "strict"), batch, out=tmp_path / "run", ask=[[{"role": "user", "content": "Hi"}]])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_config_json_says_what_was_resolved(tiny, data, tmp_path, quant):
    asked = [{"role": "user", "content": "Hi"}]
    how = {"tokens": 64, "max_steps": 1, "max_new_tokens": 1, "ask": [asked, "Number 3 is"]}
    mt.train(model(tiny, lora=mt.LoRA(rank=2), quant=quant, add_tokens=["<tool>"], memory="full"), data,
             out=tmp_path / "a", **how)
    mt.train(model(tiny, adapter=tmp_path / "a" / "adapter", quant=quant), data, out=tmp_path / "b", **how)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first["ask"] == second["ask"] == [asked, "Number 3 is"]
    assert first["quant"] == second["quant"] == quant and first["add_tokens"] == ["<tool>"]
    assert first["adapter"] is None and second["adapter"] == str(tmp_path / "a" / "adapter")
    assert (first["model"]["memory"], first["model"]["memory_taken"]) == ("full", "full")


def test_ctrl_c_after_a_step_that_spoilt_the_weights_saves_nothing(tiny, data, tmp_path):
    trained = model(tiny)

    class Spoiler(Observer):
        def on_step(self, record):
            trained.trainable_parameters()[0].data.fill_(float("nan"))
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="is not written"), pytest.raises(KeyboardInterrupt):
        mt.train(trained, data, out=tmp_path / "run", tokens=64, observers=[Spoiler()], ask=())
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "adapter").exists()


def test_norms_beside_weights_in_4_bits_are_saved_with_the_decoded_ones(tiny, data, tmp_path):
    trained = model(tiny, train="norms", quant="nf4")
    mt.train(trained, data, out=tmp_path / "run", tokens=64, max_steps=2)
    ids = torch.arange(3, 30)
    again = mt.load(tmp_path / "run" / "model", device="cpu", dtype="float32")
    assert torch.allclose(again.logits(ids), trained.logits(ids), atol=1e-2)


def test_a_last_update_that_spoils_the_weights_saves_nothing(tiny, data, tmp_path):
    with pytest.raises(mt.TrainingDiverged, match="step 1: its update made weights that are not finite"):
        mt.train(model(tiny), data, out=tmp_path / "run", tokens=64, max_steps=1, lr=1e39, clip=0, warmup=0)
    assert not (tmp_path / "run" / "adapter").exists()


def test_on_a_cpu_no_step_works_for_much_filler(tiny, data, monkeypatch):
    seen = []
    trained = model(tiny)
    network = type(trained.network)
    real = network.forward
    monkeypatch.setattr(network, "forward", lambda self, tokens, *rest: (seen.append(len(tokens)),
                                                                        real(self, tokens, *rest))[1])
    batches = mt.data.stream(data, trained.tokenizer, tokens=512)
    whole = [float(sft.sft(trained, batch)[0].detach()) for batch in batches]
    assert seen == [512] * len(whole)
    seen.clear()
    assert [float(trained.loss_sum(batch)[0].detach()) for batch in batches] == pytest.approx(whole, rel=1e-6)
    losses = [trained.token_losses(batch) for batch in batches]
    assert [float(each.sum()) for each in losses] == pytest.approx(whole, rel=1e-6) and losses[0].shape == (512,)
    mt.train_step(trained, next(iter(batches)), mt.SGD(trained.trainable_parameters(), lr=1e-3))
    run = mt.train(trained, batches, valid=batches, tokens=512, max_steps=2, lr=1e-3)
    assert batches.n_filler > 100 and max(seen) < 512 - batches.n_filler + GRAIN
    assert run.n_tokens == 2 * 512 and run.n_filler == 2 * batches.n_filler


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, d: mt.train("base", d), "model is 'base'; give what mt.load returns"),
    (lambda m, d: mt.train(m, [["prompt", "completion"]]), r"data\[0\] is .*; give a file, with a sample"),
    (lambda m, d: mt.train(m, d, observers=print), "observers is .*; give a list of objects"),
    (lambda m, d: mt.train(m, d, observers=[print]), "observers is .*; give a list of objects"),
    (lambda m, d: mt.train(m, d, quiet="yes"), "quiet is .yes.; it must be True, False or None"),
    (lambda m, d: mt.train(m, d, learning_rate=1), r"no setting is named learning_rate.*; there are tokens, "),
    (lambda m, d: mt.train(m, mt.data.stream(d, m.tokenizer, tokens=128), tokens=64), "rows of 128 tokens"),
    (lambda m, d: mt.train(m, d, objective=3), r"objective is 3; give a function of \(model, batch\)"),
    (lambda m, d: mt.train(m, d, objective=lambda m: m), "objective cannot be called with a model and a batch"),
    (lambda m, d: mt.train(m, d, objective=half_the_loss, label_smoothing=0.1), "label_smoothing is 0.1, which is a"),
    (lambda m, d: mt.train(m, d, tokens=64, objective=lambda m, b: m.loss(b)), "the objective gave "),
], ids=["model", "rows", "observer", "observers", "quiet", "name", "tokens", "objective", "parameters", "smoothing",
        "no sum"])
def test_arguments_of_the_wrong_kind_get_one_message(tiny, data, call, message):
    with pytest.raises(mt.InputError, match=message):
        call(model(tiny), data)


def half_the_loss(model, batch):
    total, n = model.loss_sum(batch)
    return total / 2, n


def test_an_objective_of_the_callers_own_is_what_is_minimised(tiny, data, tmp_path):
    settings = {"tokens": 64, "epochs": 2, "lr": 1e-2, "optimizer": "sgd", "clip": 0.0, "valid": data}
    half = mt.train(model(tiny), data, **settings, objective=half_the_loss, out=tmp_path / "run")
    whole = mt.train(model(tiny), data, **settings | {"lr": 5e-3})
    assert half.losses == pytest.approx([loss / 2 for loss in whole.losses], rel=1e-5)
    assert half.evaluations[-1].loss == pytest.approx(whole.evaluations[-1].loss, rel=1e-5)     # of the next token
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"] == "half_the_loss"


def test_an_objective_may_be_an_object_that_counts_as_false(tiny, data):
    class Kept(list):
        def __call__(self, m, batch):
            total, n = m.loss_sum(batch)
            return total * 3, n

    three = mt.train(model(tiny), data, tokens=64, max_steps=1, objective=Kept())
    assert three.losses == pytest.approx([3 * mt.train(model(tiny), data, tokens=64, max_steps=1).losses[0]])


def test_an_objective_far_above_the_loss_of_guessing_is_no_divergence(tiny, data):
    run = mt.train(model(tiny), data, tokens=64, max_steps=20, lr=1e-6,
                   objective=lambda m, batch: (m.loss_sum(batch)[0] * 100, batch.n_trained))
    assert run.final_loss > 100 and not run.diverging


def test_a_stream_says_how_long_its_rows_are(tiny, data, tmp_path):
    trained = model(tiny)
    mt.train(trained, mt.data.stream(data, trained.tokenizer, tokens=128), max_steps=1, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["tokens"] == 128


def test_samples_in_memory_train_as_a_file_of_them_does_and_go_on(tiny, data, tmp_path):
    rows, held = records(data), [{"prompt": "Number 90 is", "completion": " even"}]
    by_file = mt.train(model(tiny), data, tokens=64, epochs=2, lr=1e-2)
    by_rows = mt.train(model(tiny), rows, valid=held, out=tmp_path / "run", tokens=64, epochs=2, lr=1e-2)
    assert by_rows.losses == by_file.losses and by_rows.best is not None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == "20 samples in memory"
    broken = [*rows[:3], {"prompt": "a"}]
    with pytest.raises(mt.InputError, match="samples: row 4: "):
        mt.train(model(tiny), broken, tokens=64)
    with pytest.raises(mt.InputError, match=r"train: data\[0\] is 3; give .* a list of samples"):
        mt.train(model(tiny), [3, 4], tokens=64)
    with pytest.raises(mt.InputError, match=r"stream: path is .*; give one of its tables, such as data\['a'\]"):
        mt.train(model(tiny), {"a": rows}, tokens=64)
    with pytest.raises(mt.InputError, match=r"train: valid gives \{.*; give a file, a list of samples"):
        mt.train(model(tiny), rows, valid=(row for row in held), tokens=64)
    with pytest.raises(mt.InputError, match="train: data is an empty list; give samples"):
        mt.train(model(tiny), [], tokens=64)
    with pytest.raises(mt.InputError, match=r"training: the data gives \{.*; it must give batches"):
        mt.train(model(tiny), iter(rows), tokens=64, max_steps=2)


def test_what_is_warned_of_shows_the_line_that_called(tiny, data):
    with pytest.warns(UserWarning) as warned:
        mt.train(model(tiny), data, tokens=64, max_steps=2, warmup=100, quiet=True)
    assert {Path(each.filename) for each in warned} == {Path(__file__)}


def test_patience_needs_a_loss_to_watch_and_ends_a_run_in_order(tiny, data, tmp_path):
    with pytest.raises(mt.InputError, match="patience is 2, but there is no validation loss to watch; give valid"):
        mt.train(model(tiny), data, tokens=64, patience=2)
    run = mt.train(model(tiny), data, valid=data, tokens=64, max_steps=40, lr=1e-12, evaluate_every=1, patience=2,
                   out=tmp_path / "run", ask=["Number 1 is"], save_every=1)
    assert run.end == "stopped early" and len(run.records) < 40 and run.evaluations[-1].answers
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "checkpoint").exists()
