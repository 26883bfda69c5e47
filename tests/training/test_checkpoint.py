"""A damaged checkpoint is refused by the name of its file, before a run begins."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load

from minitune.checkpoint.writer import write_safetensors
from minitune.config import Training
from minitune.errors import InputError
from minitune.training.checkpoint import read
from tests.training.stopping import Stop, checkpoints, data, train


def _truncate(folder):
    path = folder / "step-3.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _change(**fields):
    def change(folder):
        path = folder / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _tensor(name, change, summed=True):
    """Another tensor in the file; ``summed``: with the sum that the JSON then must have."""
    def rewrite(folder):
        found = load((folder / "step-3.safetensors").read_bytes())
        found[name] = change(found.get(name))
        with (folder / "step-3.safetensors").open("wb") as file:
            write_safetensors(file, {key: value for key, value in found.items() if value is not None})
        if summed:
            _change(sha256=hashlib.sha256((folder / "step-3.safetensors").read_bytes()).hexdigest())(folder)

    return rewrite


@pytest.mark.parametrize(("damage", "file", "message"), [
    (_truncate, "step-3.safetensors", "truncated"),
    (lambda folder: (folder / "step-3.safetensors").unlink(), "step-3.safetensors", "there is no such file"),
    (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json", "is not valid JSON"),
    (lambda folder: (folder / "checkpoint.json").write_text("[]"), "checkpoint.json", r"its format is \[\]"),
    (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json", "there is no such file"),
    (_change(format=1), "checkpoint.json", "its format is 1; this version of minitune goes on from format 3 alone"),
    (_change(sha256=None), "checkpoint.json", "sha256 is None"),
    (_change(step="3"), "checkpoint.json", "step is '3'"), (_change(step=0), "checkpoint.json", "step is 0"),
    (_change(step=2), "step-2.safetensors", "there is no such file"),
    (_change(micro_batches=2), "checkpoint.json", "micro_batches is 2"),
    (_change(run=None), "checkpoint.json", "run or evaluations is missing"),
    (_change(evaluations=[{"step": 1}]), "checkpoint.json", "which is no evaluation"),
    (_tensor("weights/A", lambda _: None), "step-3.safetensors", "'weights/A' is missing"),
    (_tensor("weights/A", lambda a: a[:1].clone()), "step-3.safetensors", "it cannot be read into"),
    (_tensor("weights/A", lambda a: a * float("nan")), "step-3.safetensors", "NaN"),
    (_tensor("weights/C", lambda _: torch.ones(1)), "step-3.safetensors", "'weights/C' is missing, or unknown"),
    (_tensor("optimizer/A/exp_avg", lambda _: None), "step-3.safetensors", "it needs step, exp_avg"),
    (_tensor("optimizer/A/exp_avg", lambda _: torch.ones(3)), "step-3.safetensors", "belongs to another model"),
    (_tensor("optimizer/A/exp_avg", lambda m: m * (1 + 2**-20), False), "step-3.safetensors", "its SHA-256 is not"),
    (_tensor("weights/A", lambda a: a * (1 + 2**-20), False), "step-3.safetensors", "its SHA-256 is not the one that"),
    (_tensor("run/records", lambda rows: rows[1:].clone()), "step-3.safetensors", "a row for each of the 3 steps"),
    (_tensor("run/records", lambda rows: rows | 255), "step-3.safetensors", "not finite"),
    (_tensor("generators/cpu", lambda _: None), "step-3.safetensors", "'generators/cpu' is missing"),
    (_tensor("generators/cpu", lambda state: state[:9].clone()), "step-3.safetensors", "no state of torch's generator"),
])
def test_a_damaged_checkpoint_is_refused_by_name_before_anything_begins(fakes, tmp_path, damage, file, message):
    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), Training(), observers=[Stop(3)],
              checkpoints=checkpoints(tmp_path))
    damage(tmp_path / "checkpoint")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    heard = Stop(99)
    heard.on_start = heard.on_resume = lambda _: pytest.fail("the run has begun")
    model, new = fakes.TinyModel(), fakes.TinyModel()
    with pytest.raises(InputError, match=message) as refused:
        train(fakes, model, data(fakes), Training(), start=read(tmp_path / "checkpoint"),
              observers=[heard], checkpoints=checkpoints(tmp_path, 3))
    if message.startswith("its SHA-256"):
        assert torch.equal(model.A, new.A) and torch.equal(model.B, new.B), "damaged weights reached the model"
    assert str(refused.value).startswith(str(tmp_path / "checkpoint" / file))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
