"""mt.train with objective="dpo": a whole run, its folder, how it goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch

import minitune as mt
from minitune.api import training
from minitune.api.resume import about
from minitune.errors import InputError
from minitune.objectives.dpo import DPO
from minitune.training.run import Observer
from tests.files import records

ROWS = [{"prompt": f"Number {i} is", "chosen": f" {i * i}.", "rejected": f" {i + 7}!"} for i in range(24)]
GIVEN = {"objective": "dpo", "tokens": 64, "epochs": 2, "lr": 5e-3, "quiet": True}


pytestmark = pytest.mark.filterwarnings("ignore:valid data. 6 samples. held out")


@pytest.fixture
def model(tiny):
    return mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_run_prefers_what_was_chosen(model, data, tmp_path):
    run = mt.train(model, data, valid=ROWS[:6], out=tmp_path / "out", beta=0.5, evaluate_every=4, **GIVEN)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.final_loss < 0.2
    first, last = run.evaluations[0], run.evaluations[-1]
    assert (first.loss, first.accuracy, first.perplexity) == (pytest.approx(math.log(2), abs=1e-6), 0.5, None)
    assert last.accuracy == 1.0 and last.loss < 0.2 and run.best.loss <= last.loss
    assert first.chosen == first.rejected == 0.0 and last.chosen > last.rejected
    pairs = mt.data.stream(ROWS, model.tokenizer, tokens=64, pairs=True, shuffle=False)
    assert DPO(0.5).evaluate(model, pairs.epoch(0)).accuracy == 1.0
    written = records(tmp_path / "out" / "metrics.jsonl")
    seen = [line for line in written if "valid_loss" in line]
    assert (seen[-1]["valid_chosen"], seen[-1]["valid_rejected"]) == (last.chosen, last.rejected)
    assert seen[0]["valid_accuracy"] == 0.5 and all(line["valid_perplexity"] is None for line in seen)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert (settings["objective"], settings["beta"]) == ("dpo", 0.5)


def test_what_a_finished_run_is_told_to_go_on_from(model, data, tmp_path):
    given = {**GIVEN, "out": tmp_path / "out", "max_steps": 1, "ask": ()}
    mt.train(model, data, **given)
    with pytest.raises(InputError, match=r"from what it has trained, .*adapter \(merged into its base"):
        mt.train(model, data, resume=True, **given)


def test_micro_batches_and_settings_are_those_of_any_run(tiny, model):
    alone = mt.train(model, ROWS, **GIVEN)
    other = mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")
    whole = mt.train(other, ROWS, training=mt.Training(objective="dpo", tokens=64, epochs=2, lr=5e-3), quiet=True)
    assert whole.losses == alone.losses
    third = mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")
    batches = mt.data.stream(ROWS, third.tokenizer, tokens=64, epochs=2, pairs=True)
    own = mt.train(third, batches, objective=functools.partial(_own, DPO()), tokens=64, lr=5e-3, quiet=True)
    assert own.losses[0] == pytest.approx(alone.losses[0], rel=1e-6) and len(own.losses) == len(alone.losses)


def _own(dpo, model, batch):
    """An objective of the caller's own over pairs, by trained tokens."""
    total, n = dpo(model, batch)
    return total / n * batch.n_trained, batch.n_trained


class Stop(Observer):
    def on_step(self, record):
        if record.step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(tiny, data, tmp_path):
    def loaded():
        return mt.load(tiny, lora=mt.LoRA(rank=4), dtype="float32")

    given = {**GIVEN, "valid": ROWS[:6], "ask": ()}
    straight = mt.train(loaded(), data, out=tmp_path / "straight", **given)
    stopped = loaded()
    with pytest.raises(KeyboardInterrupt):
        mt.train(stopped, data, out=tmp_path / "out", observers=[Stop()], **given)
    # also with the very model that stands half trained: its adapter comes from the checkpoint
    run = mt.train(stopped, data, out=tmp_path / "out", resume=True, **given)
    assert run.losses == straight.losses
    assert [dataclasses.replace(e, seconds=0) for e in run.evaluations] == [
        dataclasses.replace(e, seconds=0) for e in straight.evaluations] and run.evaluations[-1].chosen is not None
    assert ((tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
            == (tmp_path / "straight" / "adapter" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(KeyboardInterrupt):
        mt.train(loaded(), data, out=tmp_path / "third", observers=[Stop()], **given)
    with pytest.raises(InputError, match=r"beta is 0\.3 and was 0\.1; give what was given then$"):
        mt.train(loaded(), data, out=tmp_path / "third", resume=True, beta=0.3, **given)
    assert mt.train(loaded(), data, out=tmp_path / "third", resume=True, **given).losses == straight.losses


@pytest.mark.parametrize(("first", "then"), [("sft", "dpo"), ("dpo", "sft")])
def test_another_objective_is_another_run(tiny, data, tmp_path, first, then):
    """The adapter that sft has trained is no base's, which dpo would take it for."""
    given = {**GIVEN, "ask": (), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        mt.train(mt.load(tiny, lora=mt.LoRA(rank=4)), data, observers=[Stop()], **(given | {"objective": first}))
    with pytest.raises(InputError, match=f"the objective is {then} and was {first}; .* begin a new run"):
        mt.train(mt.load(tiny, lora=mt.LoRA(rank=4)), data, resume=True, changed=["objective", "data"],
                 **(given | {"objective": then}))


def test_a_checkpoint_without_a_setting_that_is_new(tiny, data, tmp_path, monkeypatch):
    """As one from before there was an objective to name."""
    given = {"tokens": 64, "epochs": 2, "quiet": True, "ask": (), "out": tmp_path / "out"}
    with monkeypatch.context() as older, pytest.raises(KeyboardInterrupt):
        older.setattr("minitune.api.training.about", lambda *of: {**(found := about(*of)), "training": {
            name: value for name, value in found["training"].items() if name not in ("objective", "beta")}})
        mt.train(mt.load(tiny, lora=mt.LoRA(rank=4)), data, observers=[Stop()], **given)
    assert mt.train(mt.load(tiny, lora=mt.LoRA(rank=4)), data, resume=True, **given).done


class IPO(DPO):
    def losses(self, margins):
        return (margins - 1 / (2 * self.beta)) ** 2


def test_a_loss_of_ones_own_on_pairs_is_evaluated_and_checked_as_dpo_is(tiny, model, data, tmp_path):
    given = {"tokens": 64, "epochs": 2, "lr": 5e-3, "quiet": True, "ask": ()}
    stopped = {"out": tmp_path / "out", **given}
    with pytest.raises(KeyboardInterrupt):
        mt.train(model, data, valid=ROWS[:6], objective=IPO(0.5), observers=[Stop()], **stopped)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["objective"] == "IPO(beta=0.5)"
    with pytest.raises(InputError, match=r"objective is 'IPO\(beta=2\.0\)' and was 'IPO\(beta=0\.5\)'"):
        mt.train(model, data, valid=ROWS[:6], objective=IPO(2.0), resume=True, **stopped)
    run = mt.train(model, data, valid=ROWS[:6], objective=IPO(0.5), resume=True, **stopped)
    assert run.losses[0] == pytest.approx(1.0) == run.evaluations[0].loss     # (0 - 1 / (2 · 0.5))²
    assert run.evaluations[-1].loss < 0.9 and run.evaluations[-1].perplexity is None
    with pytest.raises(InputError, match=r"the objective is IPO\(beta=0\.5\), whose reference is .*been trained"):
        mt.train(model, data, objective=IPO(0.5), **given)
    whole, listed = mt.load(tiny, lora=mt.LoRA(rank=4)), mt.load(tiny, lora=mt.LoRA(rank=4))
    batches = mt.data.stream(ROWS, whole.tokenizer, tokens=64, pairs=True)
    assert mt.train(listed, list(batches), objective="dpo", **given).losses == mt.train(
        whole, list(batches), objective=DPO(), **given).losses


REFUSED = {
    "valid holds pairs of answers, .* the objective _own.* is evaluated by the loss of the next token":
        lambda model: mt.train(model, ROWS, objective=functools.partial(_own, DPO()), quiet=True, tokens=64,
                               valid=mt.data.stream(ROWS, model.tokenizer, tokens=64, pairs=True)),
    "evaluate: batches are pairs of answers": lambda model: mt.evaluate(
        model, mt.data.stream(ROWS, model.tokenizer, tokens=64, pairs=True)),
    "the objective is dpo, and data is .* which holds no pairs": lambda model: mt.train(
        model, mt.data.stream([{"text": "a b c"}], model.tokenizer, tokens=64), objective="dpo", quiet=True),
    r"row 1: is a sample of the format text, which has no rejected answer": lambda model: mt.train(
        model, [{"text": "a"}], objective="dpo", quiet=True),
    "dpo: a batch holds 1 document that are no pairs": lambda model: mt.train(
        model, ROWS, valid=mt.data.pack([[5, 6, 7]], 8), objective="dpo", quiet=True),
    "data holds pairs of answers, .* the objective sft takes none": lambda model: mt.train(
        model, mt.data.stream(ROWS, model.tokenizer, tokens=64, pairs=True), quiet=True),
    "beta is 0.2, which only the objective dpo has": lambda model: mt.train(model, ROWS, beta=0.2, quiet=True),
    "label_smoothing is 0.1, which only the objective sft has": lambda model: mt.train(
        model, ROWS, label_smoothing=0.1, objective="dpo", quiet=True),
    "objective is 'ppo'; it must be one of sft, dpo": lambda model: mt.train(model, ROWS, objective="ppo", quiet=True),
    r"beta is 0.*; it must be": lambda model: mt.train(model, ROWS, objective="dpo", beta=0, quiet=True),
    "and the training's is 'dpo'; give one of them": lambda model: mt.train(
        model, ROWS, objective=functools.partial(_own, DPO()), training=mt.Training(objective="dpo"), quiet=True),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_it_refuses(model, said):
    with pytest.raises(InputError, match=said):
        REFUSED[said](model)


def test_the_reference_is_a_base_under_a_new_adapter(tiny, model, tmp_path):
    mt.train(model, [{"text": "a b c"}], max_steps=1, quiet=True)
    with pytest.raises(InputError, match=r"this adapter has been trained; merge it into the base first"):
        mt.train(model, ROWS, **GIVEN)
    with pytest.raises(InputError, match="and the base itself is trained"):
        mt.train(mt.load(tiny, train="last:1", dtype="float32"), ROWS, **GIVEN)


def test_what_the_loop_is_told_of_pairs(model, monkeypatch):
    """The reference's forward counts; no documents of a row alone are the step; ln(vocabulary) is no beginning."""
    told = {}
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **more: told.update(more) or fit(*given, **more))
    mt.train(model, ROWS, max_steps=1, **GIVEN)
    assert told["costs"].reference and not told["divisible"] and told["chance"] is None


def test_a_plan_knows_the_loss(model):
    from minitune.api.plan import plan

    pairs = mt.data.stream(ROWS, model.tokenizer, tokens=64, pairs=True)
    rows = dict(plan(model, pairs, mt.Training(objective="dpo", tokens=64)))
    assert rows["loss of the first row"] == "0.6931" and rows["data"].startswith("24 pairs, ")


def test_bf16_and_4_bits(tiny):
    for given in ({"dtype": "bfloat16"}, {"quant": "nf4-dq", "dtype": "bfloat16"}):
        found = mt.load(tiny, lora=mt.LoRA(rank=4), **given)
        run = mt.train(found, ROWS, micro_batches=2, **GIVEN)
        assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.final_loss < 0.6
        assert all(math.isfinite(loss) for loss in run.losses) and torch.is_grad_enabled()
