"""The run folder: whole at any moment, honest about its settings and its machine, and the best is kept."""

from __future__ import annotations

import getpass
import json
import math
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from minitune.config import Training
from minitune.errors import InputError, NotSaved
from minitune.report import environment as environment_module
from minitune.report.environment import environment
from minitune.report.folder import RunFolder, check_free, plain, run_folder
from minitune.report.metrics import AnswersFile, MetricsFile
from minitune.training.run import EvaluationRecord, Run, RunInfo, SampleAnswer, StepRecord

INFO = RunInfo(total_steps=3, n_parameters=7, device="cpu", training=Training(schedule="slanted-triangular"),
               matrix_rate=1e12)


def step(number, loss=1.0):
    return StepRecord(step=number, loss=loss, lr=0.1, grad_norm=1.0, n_trained=1, n_tokens=2, seconds=1.0,
                      left_out=not math.isfinite(loss))


def seen(number, loss=None, *answers):
    perplexity = None if loss is None else math.inf if loss > 700 else math.exp(loss)
    return EvaluationRecord(step=number, seconds=0.5, loss=loss, perplexity=perplexity, accuracy=0.5, n_tokens=9,
                            answers=answers)


def wanted(folder: Path) -> str:
    """The name that a folder takes when it is whole, by the one that it is filled under: .NAME.PID.tmp."""
    return folder.name.split(".")[1]


class Saver:
    """Saves a file that says how often it was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, folder: Path) -> None:
        self.calls.append(wanted(folder))
        (folder / "weights").write_text(str(len(self.calls)))


def sound():
    return True


@pytest.mark.parametrize("kept", [True, False])
def test_a_last_write_that_fails_is_no_bad_input_and_says_what_stands(tmp_path, kept):
    def save(folder):
        raise InputError(f"{folder}: cannot be written: No space left on device")

    folder = RunFolder(tmp_path / "run", save, sound, "adapter", {})
    folder.on_start(INFO)
    if kept:
        (tmp_path / "run" / "checkpoint").mkdir()
        (tmp_path / "run" / "checkpoint" / "step-1.json").write_text("{}")
    run = Run(info=INFO, records=[step(1)])
    run.end = "finished"
    said = "the last checkpoint stands: make room, and resume" if kept else "what was trained is lost, since no"
    with pytest.raises(NotSaved, match=f"No space left on device; {said}"):
        folder.on_end(run)
    assert run.adapter is None and (tmp_path / "run" / "checkpoint").exists() is kept
    folder._best = tmp_path / "run" / "adapter-best"
    said = said if kept else r"what was trained is lost but for the best so far, \S+/adapter-best, since no"
    with pytest.raises(NotSaved, match=said):
        folder.on_end(run)


def test_settings_and_machine_are_written_at_the_start(tmp_path):
    folder = RunFolder(tmp_path / "run", Saver(), sound, "adapter", {"data": Path("a.jsonl"), "nan": math.nan,
                                                                     "late": lambda: "said at the start"})

    class Account:
        def as_dict(self):
            return {"trained": 3}

    folder.on_ledger({"train": Account()})
    assert not (tmp_path / "run").exists()
    folder.on_start(INFO)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == "a.jsonl" and config["nan"] is None and config["late"] == "said at the start"
    assert config["trained_parameters"] == 7
    assert config["training"]["warmup"] == 0.1 and config["training"]["min_lr_ratio"] == 1 / 32
    assert config["training"]["lr"] == 2e-4 and config["total_steps"] == 3
    machine = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert machine["matrix_flops_per_second"] == 1e12 and machine["packages"]["torch"] and machine["device"] == "cpu"
    assert json.loads((tmp_path / "run" / "ledger.json").read_text()) == {"train": {"trained": 3}}
    assert len(list((tmp_path / "run").iterdir())) == 3
    with pytest.raises(InputError, match="exists already"):
        folder.on_start(INFO)


def test_the_best_is_that_of_the_lowest_validation_loss(tmp_path):
    saver = Saver()
    folder = RunFolder(tmp_path, saver, sound, "adapter", {})
    run = Run(info=INFO, records=[step(1), step(2)], end="finished")
    for record in (seen(0, 0.5), seen(1, 2.0), seen(2, 1.0), seen(3, 1.5), seen(4, math.nan), seen(5)):
        folder.on_evaluation(record)
    assert saver.calls == ["adapter-best", "adapter-best"]
    folder.on_end(run)
    assert saver.calls[2:] == ["adapter"]
    assert (run.adapter, run.best_adapter) == (tmp_path / "adapter", tmp_path / "adapter-best")


def test_a_better_one_takes_the_place_of_the_best_whole_or_not_at_all(tmp_path):
    saver = Saver()
    folder, best = RunFolder(tmp_path, saver, sound, "model", {}), tmp_path / "model-best"
    folder.on_evaluation(seen(1, 3.0))
    (best / "model-00002-of-00002.safetensors").write_text("of a model in shards")

    def full(path):
        saver(path)
        assert (best / "weights").read_text() == "1", "the old one is touched before the new one is whole"
        raise OSError(28, "No space left on device", str(path))

    folder.save = full
    with pytest.warns(UserWarning, match="step 2: the best so far is not kept: .*No space left.*; that of before"):
        folder.on_evaluation(seen(2, 2.0))
    assert {path.name for path in best.iterdir()} == {"weights", "model-00002-of-00002.safetensors", "evaluation.json"}
    folder.save = saver
    folder.on_evaluation(seen(3, 2.5))
    assert [path.name for path in tmp_path.iterdir()] == ["model-best"]
    assert {path.name for path in best.iterdir()} == {"weights", "evaluation.json"}
    assert (best / "weights").read_text() == "3"


@pytest.mark.parametrize(("records", "end", "saved"), [
    ([step(1)], "interrupted", True), ([], "interrupted", False), ([step(1), step(2, math.nan)], "diverged", True),
    ([step(1, math.nan)], "diverged", False), ([step(1)], "failed", True)])
def test_a_run_that_was_stopped_keeps_what_is_sound(tmp_path, records, end, saved):
    saver = Saver()
    run = Run(info=INFO, records=records, end=end)
    RunFolder(tmp_path, saver, sound, "model", {}).on_end(run)
    assert saver.calls == (["model"] if saved else []) and (run.adapter is not None) == saved
    assert run.best_adapter is None


@pytest.mark.parametrize("end", ["interrupted", "failed"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, end):
    saver = Saver()
    folder = RunFolder(tmp_path, saver, lambda: False, "adapter", {})
    run = Run(info=INFO, records=[step(1)], end=end)
    folder.on_evaluation(seen(1, 1.0))
    with pytest.warns(UserWarning, match="adapter is not written: the last step made weights that are not finite"):
        folder.on_end(run)
    assert saver.calls == [] and run.adapter is None and run.best_adapter is None
    folder.on_end(Run(info=INFO, records=[step(1)], end="diverged"))       # its own error says so
    assert saver.calls == []


def test_metrics_and_answers_hold_the_evaluations(tmp_path):
    metrics, answers = MetricsFile(tmp_path / "metrics.jsonl"), AnswersFile(tmp_path / "answers.jsonl")
    for observer in (metrics, answers):
        observer.on_start(INFO)
    assert not (tmp_path / "answers.jsonl").exists()
    metrics.on_step(step(1))
    for record in (seen(1, 1.0, SampleAnswer(question="é?", answer="\n\x1b")), seen(2, 800.0), seen(3)):
        metrics.on_evaluation(record)
        answers.on_evaluation(record)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 1, "valid_loss": 1.0, "valid_perplexity": math.e, "valid_accuracy": 0.5,
                        "valid_tokens": 9, "evaluation_seconds": 0.5}
    assert [line["step"] for line in lines] == [1, 1, 2] and lines[2]["valid_perplexity"] is None
    text = (tmp_path / "answers.jsonl").read_text("utf-8")
    assert json.loads(text) == {"step": 1, "question": "é?", "answer": "\n\x1b"} and "é" in text
    for observer in (metrics, answers):
        observer.on_end(Run(info=INFO))


def test_all_observers_of_a_folder_work_together(tmp_path):
    pytest.importorskip("matplotlib")
    observers = run_folder(tmp_path / "run", Saver(), sound, "adapter", {})
    run = Run(info=INFO, records=[step(1), step(2)], evaluations=[seen(0, 2.0), seen(2, 1.0)], end="finished")
    for method, what in (("on_start", INFO), ("on_evaluation", seen(2, 1.0)), ("on_end", run)):
        for observer in observers:
            getattr(observer, method)(what)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "adapter", "adapter-best", "loss.png"}


def test_a_folder_is_free_if_it_is_new_or_empty(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "new")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists already; name another folder"):
            check_free(taken)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link is a link to nowhere, which is not there; make that folder, or"):
        check_free(tmp_path / "link")


def test_the_environment_names_no_user_and_no_host(monkeypatch, tmp_path):
    named = platform.uname()._replace(node="name-of-the-host")
    for module, name in ((platform, "node"), (socket, "gethostname"), (socket, "getfqdn"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda *_: "name-of-the-host")
    monkeypatch.setattr(platform, "uname", lambda: named)
    for name in ("HOSTNAME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "name-of-the-host")
    found = environment("cpu")
    assert found["gpu"] is None and found["cores"] >= 1 and found["python"].startswith("3.")
    text = json.dumps(plain(found))
    assert str(Path.home()) not in text and "name-of-the-host" not in text
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    assert environment("cpu")["commit"] is None and environment("cpu")["changed"] is None
    (tmp_path / ".git").mkdir()
    assert environment("cpu")["commit"] is None      # a broken checkout


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_checkout_has_its_commit(tmp_path, monkeypatch):
    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        run = subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    (tmp_path / "file").write_text("one")
    git("init")
    git("add", "file")
    git("commit", "-m", "one")
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    found = environment("cpu")
    assert (found["commit"], found["changed"]) == (git("rev-parse", "HEAD"), False) and len(found["commit"]) == 40
    (tmp_path / "file").write_text("two")
    assert environment("cpu")["changed"] is True


def test_plain_values():
    assert plain({"a": (1, Path("x"), math.inf), 2: None, "b": {True: {3}}}) == {
        "a": [1, "x", None], "2": None, "b": {"True": "{3}"}}


def test_memory_that_runs_out_at_the_last_write_is_told_with_what_stands(tmp_path):
    def save(folder):
        raise MemoryError

    folder = RunFolder(tmp_path / "run", save, sound, "adapter", {})
    folder.on_start(INFO)
    run = Run(info=INFO, records=[step(1)])
    run.end = "finished"
    with pytest.raises(NotSaved, match="out of memory; what was trained is lost, since no checkpoint"):
        folder.on_end(run)
