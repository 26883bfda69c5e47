"""minitune train --resume: after a kill that leaves no time for anything, after Ctrl-C, and where it cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.training.run import Observer
from tests.files import records, write_numbers

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
from minitune.cli import main
from minitune.report.metrics import MetricsFile
plain = MetricsFile.on_step
def on_step(self, record):
    plain(self, record)
    if record.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.on_step = on_step
main(sys.argv[1:])
"""


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(30))


def words(tiny, data, out, *more):
    return ["train", str(tiny), str(data), "--out", str(out), "--tokens", "64", "--epochs", "3", "--dropout", "0.1",
            "--rank", "2", "--save-every", "3", "--device", "cpu", "--max-new-tokens", "3", *more]


def test_a_killed_run_goes_on(tiny, data, tmp_path, capsys):
    out, straight = tmp_path / "run", tmp_path / "straight"
    main(words(tiny, data, straight))
    printed = capsys.readouterr().out
    killed = subprocess.run([sys.executable, "-c", KILLED, str(torch.get_num_threads()), *words(tiny, data, out)],
                            capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len([line for line in records(out / "metrics.jsonl") if "loss" in line]) == 7
    assert {path.name for path in (out / "checkpoint").iterdir()} == {"checkpoint.json", "step-6.safetensors"}
    main(words(tiny, data, out, "--resume"))
    again = capsys.readouterr()
    assert "resumed after step 6 of " in again.err
    assert again.out.splitlines()[:-1] == printed.splitlines()[:-1]     # the answers, before and after
    for name in ("adapter/adapter_model.safetensors", "answers.jsonl", "ledger.json"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()
    losses = [[line["loss"] for line in records(folder / "metrics.jsonl") if "loss" in line]
              for folder in (out, straight)]
    assert losses[0] == losses[1] and not (out / "checkpoint").exists()
    with pytest.raises(SystemExit) as ended:
        main(words(tiny, data, out, "--resume"))
    assert ended.value.code == 2 and "the run is finished, there is nothing to resume" in capsys.readouterr().err


def test_ctrl_c_says_that_the_run_can_be_resumed(tiny, data, tmp_path, capsys, monkeypatch):
    from minitune.report.metrics import MetricsFile

    class Impatient(Observer):
        def __init__(self, *_):
            pass

        def on_step(self, record):
            if record.step == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(MetricsFile, "on_step", Impatient.on_step)
        main(words(tiny, data, tmp_path / "run"))
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert f"saved in {tmp_path / 'run' / 'adapter'}, it can be resumed after step 4; " in said
    for flags, message in (((), "with a run that did not end: go on with it (--resume"),
                           (("--resume", "--lr", "1"), "training.lr is 1.0 and was 0.0002")):
        with pytest.raises(SystemExit) as ended:
            main(words(tiny, data, tmp_path / "run", *flags))
        assert ended.value.code == 2 and message in capsys.readouterr().err
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    main(words(tiny, data, tmp_path / "run", "--resume", "--dry-run"))
    assert "nothing is written" in capsys.readouterr().out
    assert before == sorted(path.name for path in (tmp_path / "run").iterdir())


def test_tensorboard_shows_no_step_twice(tiny, data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minitune.report.metrics import MetricsFile
    from minitune.training.runner import Runner

    def impatient(self, record):
        if record.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MetricsFile, "on_step", impatient)
        patched.setattr(Runner, "broken_off", lambda *_: None)      # as if it was killed: its checkpoint is of step 3
        main(words(tiny, data, tmp_path / "run", "--tensorboard"))
    main(words(tiny, data, tmp_path / "run", "--tensorboard", "--resume"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == sorted(set(steps)) and len(steps) >= 8
