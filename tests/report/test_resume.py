"""What the run folder and the progress make of a run that goes on."""

from __future__ import annotations

import io
import json
import math

import pytest

from minitune.config import Training
from minitune.report.folder import EVALUATION, RunFolder, run_folder
from minitune.report.metrics import AnswersFile, MetricsFile
from minitune.report.progress import ProgressBar, ProgressLines, summary
from minitune.training.run import EvaluationRecord, Run, RunInfo, SampleAnswer, StepRecord


def step(number):
    return StepRecord(step=number, loss=1.0, lr=0.1, grad_norm=1.0, n_trained=1, n_tokens=2, seconds=1.0)


def seen(number, loss, *answers):
    return EvaluationRecord(step=number, seconds=0.5, loss=loss, perplexity=None if loss is None else math.exp(loss),
                            accuracy=0.5, n_tokens=9, answers=answers)


def going_on(evaluations, n_steps=4, **training):
    info = RunInfo(total_steps=10, n_parameters=7, device="cpu", training=Training(**training))
    return Run(info=info, records=[step(i + 1) for i in range(n_steps)], evaluations=evaluations)


def keeping(folder):
    """(the observer, the names of what it has saved)"""
    saved = []
    return RunFolder(folder, lambda path: saved.append(path.name.split(".")[1]), lambda: True, "adapter", {}), saved


def best_of(folder, number, loss):
    (folder / "adapter-best").mkdir(parents=True)
    (folder / "adapter-best" / EVALUATION).write_text(json.dumps({"step": number, "valid_loss": loss}))


@pytest.mark.parametrize("told", [True, False])
def test_the_best_of_before_stays_until_there_is_a_better_one(tmp_path, told):
    """Told by its folder, or, where an earlier version wrote that, by the run."""
    best_of(tmp_path, 2, 1.0)
    if not told:
        (tmp_path / "adapter-best" / EVALUATION).unlink()
    folder, saved = keeping(tmp_path)
    run = going_on([seen(0, 0.1), seen(2, 1.0), seen(4, 1.5)])
    folder.on_resume(run)
    folder.on_evaluation(seen(6, 1.2))
    assert saved == []
    folder.on_end(run)
    assert run.best_adapter == tmp_path / "adapter-best"
    saved.clear()
    folder.on_evaluation(seen(8, 0.9))
    assert saved == ["adapter-best"]
    assert json.loads((tmp_path / "adapter-best" / EVALUATION).read_text()) == {"step": 8, "valid_loss": 0.9}


def test_a_best_that_could_not_be_kept_is_not_taken_for_what_lies_there(tmp_path):
    """The disk was full at step 6: what lies there is step 4's."""
    best_of(tmp_path, 4, 1.0)
    folder, saved = keeping(tmp_path)
    run = going_on([seen(4, 1.0), seen(6, 0.7)], n_steps=7)
    folder.on_resume(run)
    with pytest.warns(UserWarning, match=r"adapter-best: is of step 4 whose validation loss was 1\.0000; that of "
                                         r"step 6, 0\.7000, was not kept"):
        folder.on_end(run)
    saved.clear()
    folder.on_evaluation(seen(8, 0.75))
    assert saved == ["adapter-best"]


@pytest.mark.parametrize(("again", "told"), [(0.7, False), (0.8, True), (0.6, False)])
@pytest.mark.parametrize(("kills", "later"), [(1, False), (2, False), (1, True)])
def test_a_best_of_steps_that_are_done_again_is_known_as_that(tmp_path, recwarn, again, told, kills, later):
    """Killed after the evaluation of step 6, whose loss was 0.7; resumed from step 4; step 6 gives `again`."""
    best_of(tmp_path, 6, 0.7)
    for _ in range(kills):
        folder, saved = keeping(tmp_path)
        run = going_on([seen(0, 3.0), seen(4, 1.0)])
        folder.on_resume(run)
    run.evaluations.append(seen(6, again))
    folder.on_evaluation(run.evaluations[-1])
    assert saved == (["adapter-best"] if again < 0.7 else [])
    if later:       # and resumed again, behind that step
        folder = keeping(tmp_path)[0]
        folder.on_resume(run)
    folder.on_end(run)
    said = [str(each.message) for each in recwarn if "adapter-best: is of step 6 of a part that was lost" in
            str(each.message)]
    assert len(said) == told == bool(len(recwarn)) and all("0.7000" in each for each in said)


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    names = [".train.toml.7.tmp", ".adapter-best.7.tmp/adapter_model.safetensors", ".adapter-best.7.old/a",
             "checkpoint/.step-2.safetensors.7.tmp", "adapter/.adapter_config.json.7.tmp", "mine/.a.7.tmp"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    run = going_on([seen(2, 1.0)])
    folder = RunFolder(tmp_path, lambda path: None, lambda: True, "adapter", {})
    folder.on_resume(run)
    folder.on_end(run)
    assert run.best_adapter == tmp_path / "adapter-best"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "adapter-best/a", "mine/.a.7.tmp"}


@pytest.mark.parametrize(("end", "restored", "kept", "saved"), [
    ("finished", None, False, True), ("out of data", None, False, True), ("interrupted", None, True, True),
    ("failed", None, True, True), ("diverged", 2, True, True), ("diverged", None, True, True)])
def test_the_checkpoint_goes_with_the_end(tmp_path, end, restored, kept, saved):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-1.json").write_text("{}")
    run, done = going_on([]), []
    run.end, run.restored = end, restored
    folder = run_folder(tmp_path, lambda path: done.append(path.name.split(".")[1]), lambda: True, "adapter", {})
    for observer in folder[:-1]:
        observer.on_end(run)
        assert (tmp_path / "checkpoint").exists()       # until all that the run leaves is written
    folder[-1].on_end(run)
    assert (tmp_path / "checkpoint").exists() == kept and done == (["adapter"] if saved else [])


def test_a_checkpoint_stays_where_what_was_trained_is_not_saved(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-1.json").write_text("{}")
    run = going_on([])
    run.end = "finished"
    with pytest.warns(UserWarning, match="adapter is not written"):
        for observer in run_folder(tmp_path, lambda path: None, lambda: False, "adapter", {}):
            observer.on_end(run)
    assert run.adapter is None and (tmp_path / "checkpoint" / "step-1.json").is_file()


def test_the_files_are_written_anew_up_to_the_checkpoint(tmp_path):
    answers = SampleAnswer(question="a", answer="b")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n{"st')
    (tmp_path / "answers.jsonl").write_text('{"step": 9}\n')
    run = going_on([seen(0, 2.0, answers), seen(2, None, answers), seen(4, 1.0)], log_every=2)
    for observer in (MetricsFile(tmp_path / "metrics.jsonl"), AnswersFile(tmp_path / "answers.jsonl")):
        observer.on_resume(run)
        observer.on_end(run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [
        (0, False), (1, True), (2, True), (4, True), (4, False)]
    assert lines[1]["tokens_per_second"] == 2.0
    assert [json.loads(line)["step"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == [0, 2]


def test_progress_says_where_it_goes_on(monkeypatch):
    times = iter((0.0, 3.0, 4.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    said = io.StringIO()
    lines = ProgressLines(said)
    lines.on_resume(going_on([]))
    lines.on_step(step(5))
    lines.on_step(step(6))
    shown = said.getvalue().splitlines()
    assert shown[1] == "resumed after step 4 of 10"
    assert shown[2].endswith("left 0:15") and shown[3].endswith("left 0:08")       # 3 s a step, then 2
    monkeypatch.undo()
    pytest.importorskip("rich")
    said = io.StringIO()
    bar = ProgressBar(said)
    bar.on_resume(going_on([]))
    assert bar._bar.tasks[0].completed == 4 and "resumed after step 4 of 10" in said.getvalue()
    bar.on_end(going_on([]))


def test_the_summary_says_that_a_run_can_be_resumed(tmp_path):
    run = going_on([])
    run.end, run.adapter, run.checkpoint = "interrupted", tmp_path / "adapter", 4
    assert summary(run).startswith(f"interrupted after 4 steps, what was trained is saved in {tmp_path / 'adapter'}, "
                                   "it can be resumed after step 4; ")
