"""The observers of a run: metrics.jsonl parses, the PNG shows a curve, progress and tables read well anywhere."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import sys

import pytest

from minitune.config import Training
from minitune.errors import NotSaved
from minitune.report.metrics import MetricsFile
from minitune.report.plot import LossPlot, plot_loss, running_mean
from minitune.report.progress import ProgressBar, ProgressLines, clock, progress, summary
from minitune.report.tables import Compared, print_answers, print_table
from minitune.report.terminal import SPOKEN, one_line, visible
from minitune.training.run import EvaluationRecord, Run, RunInfo, StepRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(observer, steps=30, loss=lambda step: 3.0 / step) -> Run:
    """A run without a model: tells the observer what a loop would."""
    run = Run(info=RunInfo(total_steps=steps, n_parameters=1234567, device="cpu", training=Training()))
    observer.on_start(run.info)
    for step in range(1, steps + 1):
        record = StepRecord(step=step, loss=loss(step), lr=1e-4, grad_norm=0.5, n_trained=60, n_tokens=100,
                            seconds=0.05)
        run.records.append(record)
        observer.on_step(record)
    run.end = "finished"
    observer.on_end(run)
    return run


def without_rich(monkeypatch) -> None:
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.partition(".")[0] == "rich":
            raise ImportError("No module named 'rich'")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fail)


def test_metrics_file_has_one_line_a_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    run = play(MetricsFile(path), loss=lambda step: float("nan") if step == 3 else 1.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[2]["loss"] is None and lines[3]["loss"] == 1.5
    assert lines[0].keys() == {*vars(run.records[0]), "tokens_per_second"} and lines[0]["tokens_per_second"] == 2000
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_metrics_file_is_complete_at_any_time_and_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    observer = MetricsFile(path)
    assert path.read_text() == "old\n"
    observer.on_start(RunInfo(total_steps=2, n_parameters=1, device="cpu", training=Training()))
    assert path.read_text() == ""
    observer.on_step(StepRecord(step=1, loss=1.0, lr=0.1, grad_norm=1.0, n_trained=1, n_tokens=2, seconds=1.0))
    assert json.loads(path.read_text())["n_tokens"] == 2
    observer.on_end(Run(info=RunInfo(total_steps=2, n_parameters=1, device="cpu", training=Training())))


@pytest.fixture
def full():
    """A disk that takes no file of more than 1000 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a file that is open cannot be removed")
def test_a_file_that_was_removed_meanwhile_is_told(tmp_path, recwarn):
    path = tmp_path / "metrics.jsonl"
    play(MetricsFile(path))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: was removed while the run wrote it, and its lines are lost"):
        play(MetricsFile(path), loss=lambda step: 1.0 if step != 3 else path.unlink() or 1.0)


def test_a_full_disk_is_told_with_the_file_that_it_hit(tmp_path, full):
    observer = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(NotSaved, match=r"metrics\.jsonl: cannot be written: File too large"):
        play(observer)
    observer.on_end(Run(info=RunInfo(total_steps=2, n_parameters=1, device="cpu", training=Training())))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) > 3
    with pytest.warns(UserWarning, match=r"loss\.png is not drawn: .* cannot be written: File too large"):
        play(LossPlot(tmp_path / "loss.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_loss_plot_shows_the_curve_and_leaves_matplotlib_alone(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    loaded = "matplotlib.pyplot" in sys.modules
    play(LossPlot(tmp_path / "a" / "loss.png"))
    play(LossPlot(tmp_path / "flat.png"), loss=lambda step: 1.0)
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    curve, flat = image.imread(tmp_path / "a" / "loss.png"), image.imread(tmp_path / "flat.png")
    assert curve.shape == flat.shape and curve.shape[0] > 300 and curve.shape[1] > 500
    assert len(set(map(tuple, curve.reshape(-1, curve.shape[-1])))) > 20
    assert (curve != flat).mean() > 0.002
    seen = [EvaluationRecord(step=i, seconds=0, loss=2.0 - i / 30) for i in range(0, 30, 6)]
    plot_loss(play(LossPlot(tmp_path / "b.png")).records, tmp_path / "b.png", evaluations=seen)
    assert (image.imread(tmp_path / "b.png") != curve).mean() > 0.002
    (tmp_path / "b.png").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "flat.png"]


def test_loss_plot_without_matplotlib_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"loss\.png will not be drawn: matplotlib is not installed") as caught:
        play(LossPlot(tmp_path / "loss.png"))
    assert len(caught) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "words"), [
    (OSError(28, "No space left on device"), "cannot be written: No space left"), (MemoryError(), "MemoryError"),
    (ImportError("libtiff.so: failed to map segment"), "failed to map")])
def test_a_loss_plot_that_fails_ends_no_run_and_leaves_nothing(tmp_path, monkeypatch, error, words):
    figures = pytest.importorskip("matplotlib.figure")

    def fails(self, file, **_):
        file.write(b"half")
        raise error

    monkeypatch.setattr(figures.Figure, "savefig", fails)
    with pytest.warns(UserWarning, match=rf"loss\.png is not drawn: .*{words}.*; metrics\.jsonl has"):
        play(LossPlot(tmp_path / "loss.png"))
    assert not list(tmp_path.iterdir())


def test_running_mean_starts_unbiased_and_passes_over_nan():
    assert running_mean([2.0, 2.0, float("nan"), 2.0]) == pytest.approx([2.0] * 4)
    assert running_mean([0.0, 1.0], decay=0.5) == pytest.approx([0.0, 2 / 3])


def test_plain_progress_says_what_matters():
    stream = io.StringIO()
    observer = progress(stream)
    assert isinstance(observer, ProgressLines)
    play(observer, steps=200)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 1,234,567 parameters on cpu, 200 steps"
    assert lines[1].startswith("step   1/200  loss  3.0000     2,000 tokens/s  left ")
    assert len(lines) == 1 + 21 + 1 and lines[-2].startswith("step 200/200")
    assert lines[-1] == ("finished: 200 steps; 20,000 tokens (12,000 trained, rows 100% full) in 0:10; 2,000 tokens/s "
                         "overall, 2,000 steady; final loss 0.0150")


@pytest.mark.parametrize("shown", [ProgressLines, ProgressBar])
def test_a_run_goes_on_unseen_when_nobody_listens_any_more(shown):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as stream:
        observer = shown(stream)
        observer.on_note("a")
        play(observer)
        with pytest.raises(BrokenPipeError):
            stream.flush()


def test_the_summary_tells_filler_and_what_was_lost():
    info = RunInfo(total_steps=30, n_parameters=1, device="cpu", training=Training())
    record = StepRecord(step=1, loss=2.5, lr=0.1, grad_norm=1.0, n_trained=33, n_tokens=2048, n_filler=1985,
                        seconds=0.5)
    run = Run(info=info, records=[record], end="interrupted")
    assert summary(run) == ("interrupted after 1 step, what was trained is not saved; 63 tokens (33 trained, rows 3% "
                            "full) in 0:00; 126 tokens/s overall, 126 steady; final loss 2.5000")
    run = Run(info=info, records=[record] * 30)
    assert summary(run).startswith("failed after 30 steps, what was trained is not saved; 1,890 tokens (990 trained,")
    assert summary(Run(info=info)) == "failed before the first step; nothing is kept"


def test_bar_on_a_terminal_and_lines_without_rich(monkeypatch):
    pytest.importorskip("rich")
    stream = Terminal()
    observer = progress(stream)
    assert isinstance(observer, ProgressBar)
    play(observer)
    text = stream.getvalue()
    assert "30/30" in text and "loss" in text and "finished: 30 steps" in text
    without_rich(monkeypatch)
    assert isinstance(progress(Terminal()), ProgressLines)


def test_a_bar_is_closed_when_the_run_fails_before_its_first_step():
    pytest.importorskip("rich")
    stream = Terminal()
    observer = progress(stream)
    run = Run(info=RunInfo(total_steps=3, n_parameters=1, device="cpu", training=Training()))
    observer.on_start(run.info)
    observer.on_end(run)
    assert "failed" not in stream.getvalue()      # the error is told, and there is nothing to sum up
    assert not observer._bar.live.is_started


def test_a_run_that_failed_before_its_first_step_has_no_summary():
    info = RunInfo(total_steps=3, n_parameters=1, device="cpu", training=Training())
    for end, shown in (("failed", False), ("interrupted", True)):
        stream = io.StringIO()
        progress(stream).on_end(Run(info=info, end=end))
        assert (f"{end} before the first step; nothing is kept" in stream.getvalue()) == shown


def test_clock():
    assert [clock(s) for s in (0, 7.4, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]


ANSWERS = [Compared("What is minitune?", "the [bold]sea\x1b[31m " * 9, "A trainer for Llama.", "trainer"),
           Compared("Who?", "a trainer", "a trainer", "trainer")]


def test_an_answer_is_learned_if_its_phrase_is_new():
    assert [a.learned for a in ANSWERS] == [True, False]
    assert Compared("?", "x", "y").learned is None and Compared("?", "x", "y", "z").learned is False


@pytest.mark.parametrize("rich", [True, False])
def test_answers_are_printed_whole_and_harmless(monkeypatch, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        without_rich(monkeypatch)
    for stream in (Terminal(), io.StringIO()):
        print_answers(ANSWERS, stream)
        text = stream.getvalue()
        assert "[bold]sea" in text and "\x1b[31m" not in text
        assert all(word in text for word in ("question", "before", "after", "learned", "yes", "NO"))
        assert ("│" in text) == (rich and stream.isatty())


def test_plain_table_is_aligned():
    stream = io.StringIO()
    print_table("Speed", ["step", "tokens/s"], [[1, "2,000"], [10, 5]], stream)
    assert stream.getvalue() == "Speed\nstep  tokens/s\n----  --------\n1     2,000\n10    5\n"


def test_clean_keeps_text_and_shows_controls():
    assert one_line("a\n b\tc é 漢 \x1b[0m\x07") == "a b c é 漢 \\x1b[0m\\x07"


def test_what_is_harmless_on_a_terminal():
    assert visible("a\n\tb é 漢 \x1b[0m\x07\r\x9b\x7f", SPOKEN) == "a\n\tb é 漢 \\x1b[0m\\x07\\x0d\\x9b\\x7f"


def test_plain_lines_come_even_if_only_some_steps_are_told():
    """Steps told every 20 of 1720 rarely fall on a twentieth of the run."""
    stream = io.StringIO()
    observer = ProgressLines(stream)
    observer.on_start(RunInfo(total_steps=1720, n_parameters=1, device="cpu", training=Training(log_every=20)))
    for step in (1, *range(20, 1721, 20)):
        observer.on_step(StepRecord(step=step, loss=1.0, lr=0.1, grad_norm=1.0, n_trained=1, n_tokens=2, seconds=1.0))
    assert 15 <= len(stream.getvalue().splitlines()) - 1 <= 25
