"""Progress with evaluations, in a notebook too, and TensorBoard's event files."""

from __future__ import annotations

import io
import sys
import types

import pytest

from minitune.config import Training
from minitune.data.ledger import Epoch, Ledger, Note, Source
from minitune.errors import InputError
from minitune.report.progress import (
    ProgressCell,
    ProgressLines,
    evaluation,
    in_notebook,
    is_watched,
    numbers,
    opening,
    progress,
    summary,
)
from minitune.report.tensorboard import TensorBoard
from minitune.training.run import EvaluationRecord, Run, RunInfo, SampleAnswer, StepRecord

INFO = RunInfo(total_steps=2, n_parameters=1234, device="cpu", training=Training(), matrix_rate=2e12)
STEP = StepRecord(step=1, loss=2.5, lr=0.1, grad_norm=1.0, n_trained=33, n_tokens=2048, seconds=0.5, flops=6.2e11,
                  memory=3_210_000_000)
SEEN = EvaluationRecord(step=1, seconds=0.1, loss=1.25, perplexity=3.49, accuracy=0.456, n_tokens=10,
                        answers=(SampleAnswer(question="Who?", answer="# me"),))


def ledger(name="a.jsonl", notes=()):
    source = Source(path=name, samples=2, documents=2, pieces=2, tokens=9, trained=5, masked=4, truncated=0, dropped=0)
    return Ledger(sources=(source,), notes=notes,
                  epoch=Epoch(samples=2, batches=1, row=12, trained=5, masked=4, filler=3))


def test_a_line_tells_the_share_of_the_matrix_rate_and_the_memory():
    assert numbers(STEP, 2e12) == "loss  2.5000     4,096 tokens/s   62% of matrix rate  3.2 GB"
    assert numbers(STEP) == "loss  2.5000     4,096 tokens/s  3.2 GB"
    assert opening(INFO) == "training 1,234 parameters on cpu, 2 steps; matrix products here: 2.00 TFLOP/s"


def test_lines_tell_ledgers_evaluations_and_the_best():
    stream = io.StringIO()
    observer = ProgressLines(stream)
    note = Note("the same as another", 1, ("a.jsonl:3",))
    observer.on_ledger({"train": ledger(), "valid": ledger("b.jsonl", (note,))})
    observer.on_start(INFO)
    observer.on_evaluation(SEEN)
    observer.on_evaluation(EvaluationRecord(step=2, seconds=0.1, answers=SEEN.answers))
    observer.on_end(Run(info=INFO, records=[STEP], evaluations=[SEEN], end="finished"))
    text = stream.getvalue()
    assert "a.jsonl" in text and "validation" in text and "the same as another (a.jsonl:3)" in text
    assert "after step 1: validation loss 1.2500, perplexity 3.49, token accuracy 45.6%" in text.splitlines()
    assert text.rstrip().endswith("best validation loss 1.2500 after step 1") and text.count("validation loss") == 2
    before = EvaluationRecord(step=0, seconds=0.1, loss=1.0, perplexity=2.7, accuracy=0.1, n_tokens=1)
    assert evaluation(before).startswith("before training: ")


def test_the_summary_says_where_a_stopped_run_was_saved(tmp_path):
    run = Run(info=INFO, records=[STEP], end="interrupted", adapter=tmp_path / "adapter")
    assert summary(run).startswith(f"interrupted after 1 step, what was trained is saved in {tmp_path / 'adapter'}; ")


def notebook(monkeypatch):
    """A process that looks as a notebook's kernel does; what is displayed is noted."""
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, data, raw):
            shown.append(("update", data["text/plain"]))

    def display(data, raw, display_id):
        shown.append(("new", data["text/plain"]))
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    part = types.ModuleType("IPython.display")
    part.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    return shown


def test_a_notebook_has_one_line_that_renews_itself(monkeypatch, capsys):
    assert not in_notebook() and not is_watched()
    shown = notebook(monkeypatch)
    assert in_notebook() and is_watched()
    observer = progress()
    assert isinstance(observer, ProgressCell)
    observer.on_start(INFO)
    for step in (1, 1, 2):
        observer.on_step(StepRecord(**{**vars(STEP), "step": step}))
    observer.on_end(Run(info=INFO, records=[STEP], end="finished"))
    assert [kind for kind, _ in shown] == ["new", "update"] and shown[1][1].startswith("step 2/2")
    assert "training 1,234 parameters" in capsys.readouterr().out
    assert type(progress(io.StringIO())) is ProgressLines


def test_ipython_without_a_kernel_is_no_notebook(monkeypatch):
    ipython = types.ModuleType("IPython")
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not in_notebook()
    ipython.get_ipython = lambda: None
    assert not in_notebook()


def test_tensorboard_gets_every_number_and_answer(monkeypatch, tmp_path):
    told: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder):
            told.append(("folder", folder))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def add_text(self, name, text, step):
            told.append((name, text, step))

        def flush(self):
            told.append(("flush",))

        def close(self):
            told.append(("close",))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    board = TensorBoard(tmp_path / "board")
    board.on_end(Run(info=INFO))       # a run that never began
    assert told == []
    board.on_start(INFO)
    board.on_step(StepRecord(**{**vars(STEP), "loss": float("nan")}))
    board.on_evaluation(SEEN)
    board.on_end(Run(info=INFO))
    assert told == [("folder", str(tmp_path / "board")), ("train/lr", 0.1, 1), ("train/grad_norm", 1.0, 1),
                    ("train/tokens_per_second", 4096.0, 1), ("train/memory", 3_210_000_000, 1), ("valid/loss", 1.25, 1),
                    ("valid/perplexity", 3.49, 1), ("valid/accuracy", 0.456, 1),
                    ("answers/0", "    Who?\n    \n    # me", 1), ("flush",), ("close",)]


def test_without_tensorboard_it_is_said_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'minitune\[tensorboard\]'"):
        TensorBoard(tmp_path / "board")
    assert not list(tmp_path.iterdir())
