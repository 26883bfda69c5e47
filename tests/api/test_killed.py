"""The best that a run has kept loads, and the run goes on, at whatever file operation its process was killed."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from itertools import count

import pytest
import torch

import minitune as mt
from minitune.api import model as model_module
from minitune.checkpoint import files
from minitune.config import Training
from minitune.report.folder import RunFolder
from minitune.training.checkpoint import steps
from minitune.training.run import EvaluationRecord, Run, RunInfo
from tests.api.test_resume import left_behind, train
from tests.files import write_numbers
from tests.killed import killed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child of this process is killed")
KINDS = {"adapter": {"lora": mt.LoRA(rank=2, targets=("q_proj",)), "add_tokens": ["<tool>"]},
         "model": {"train": "norms"}}


@pytest.fixture(autouse=True)
def _one_thread():
    """As the process has that is killed: with more of them the last bits may be others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seen(step):
    return EvaluationRecord(step=step, seconds=0.1, loss=1.0 / step)


def value(best, kind):
    """The one value that everything in the folder that is trained must have."""
    how = {"adapter": best} if kind == "adapter" else {"train": "norms"}
    base = value.base if kind == "adapter" else best
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = mt.load(base, device="cpu", dtype="float32", **how).trainable_parameters()
    values = torch.cat([weight.detach().flatten() for weight in weights]).unique().tolist()
    assert len(values) == 1
    return values[0]


@pytest.mark.parametrize(("kind", "exchanged"), [("adapter", True), ("adapter", False), ("model", True)])
def test_the_best_loads_whatever_the_moment(tiny, tmp_path, monkeypatch, kind, exchanged):
    monkeypatch.setattr(model_module, "save_weights",
                        functools.partial(model_module.save_weights, shard_bytes=800_000))
    if not exchanged:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: None)
    value.base = tiny
    model = mt.load(tiny, device="cpu", dtype="float32", **KINDS[kind])
    save = model.save_adapter if kind == "adapter" else model.save

    def evaluated(folder, step):
        for weight in model.trainable_parameters():
            weight.data.fill_(step)
        folder.on_evaluation(seen(step))

    run = Run(info=RunInfo(total_steps=9, n_parameters=1, device="cpu", training=Training()), evaluations=[seen(1)])
    found = []
    evaluated(RunFolder(tmp_path / "first", save, lambda: True, kind, {}), 1)
    for at in count():
        out = shutil.copytree(tmp_path / "first", tmp_path / str(at))
        folder = RunFolder(out, save, lambda: True, kind, {})
        folder.on_resume(run)
        died = killed(lambda folder=folder: evaluated(folder, 2), out, at)
        if exchanged:
            assert value(out / f"{kind}-best", kind) in (1, 2), "the user must wait for the run to be resumed"
        folder.on_resume(run)
        assert os.listdir(out) == [f"{kind}-best"]
        found.append(value(out / f"{kind}-best", kind))
        shutil.rmtree(out)
        if not died:
            break
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 20


def check_resumed(tiny, tmp_path, moments):
    """A run that is killed at these moments, of which the last may come after its end, goes on from its checkpoint, if
    that is there; else it has not come to its first one, or to its end."""
    data, stood = write_numbers(tmp_path / "data.jsonl", range(30)), False
    settings = {"save_every": 2, "valid": data, "evaluate_every": 1, "max_steps": 5}
    train(tiny, data, tmp_path / "straight", **settings)
    wanted = left_behind(tmp_path / "straight")
    for at in moments:
        out = tmp_path / str(at)
        died = killed(lambda out=out: train(tiny, data, out, **settings), out, at)
        if steps(out / "checkpoint"):
            train(tiny, data, out, resume=True, **settings)
            assert not list(out.rglob(".*"))
            stood = True
        if stood:
            left = left_behind(out).items()
            assert {name: what for name, what in left if not name.startswith("checkpoint/")} == wanted
        shutil.rmtree(out, ignore_errors=True)
        if not died:
            break
    assert stood


def test_a_whole_run_goes_on(tiny, tmp_path):
    check_resumed(tiny, tmp_path, (70, 95, 120))


@pytest.mark.slow
def test_a_whole_run_goes_on_whatever_the_moment(tiny, tmp_path):
    check_resumed(tiny, tmp_path, count())
