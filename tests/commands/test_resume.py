"""minitune train --resume: after a kill that leaves no time for anything, SIGTERM, Ctrl-C, and where it cannot be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.training.checkpoint import steps
from minitune.training.run import Observer
from tests.files import records, write_numbers

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
sys.argv[0] = sys.argv.pop(1)
from minitune.cli import main
from minitune.report.metrics import MetricsFile
plain = MetricsFile.on_step
def on_step(self, record):
    plain(self, record)
    if record.step == 7:
        os.kill(os.getpid(), getattr(signal, sys.argv[0]))
MetricsFile.on_step = on_step
main(sys.argv[1:])
"""


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(30))


def words(tiny, data, out, *more):
    return ["train", str(tiny), str(data), "--out", str(out), "--tokens", "64", "--epochs", "3", "--dropout", "0.1",
            "--rank", "2", "--save-every", "3", "--device", "cpu", "--max-new-tokens", "3", *more]


def run_until_killed(by, args):
    """The command in a process of its own, which gets the signal after its seventh step."""
    return subprocess.run([sys.executable, "-c", KILLED, str(torch.get_num_threads()), by, *args], capture_output=True,
                          text=True, check=False)


def test_a_killed_run_goes_on(tiny, data, tmp_path, capsys):
    out, straight = tmp_path / "run", tmp_path / "straight"
    main(words(tiny, data, straight))
    printed = capsys.readouterr().out
    killed = run_until_killed("SIGKILL", words(tiny, data, out))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len([line for line in records(out / "metrics.jsonl") if "loss" in line]) == 7
    assert steps(out / "checkpoint") == [6, 3]
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
    assert ended.value.code == 2 and "the run has ended and left no checkpoint" in capsys.readouterr().err


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
    assert said.endswith(f"to go on: minitune train --resume --out {tmp_path / 'run'}\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert f"names the run's folder: minitune train --resume --out {tmp_path / 'run'}\n" in capsys.readouterr().err
    for flags, message in (((), "with a run that did not end: go on with it (--resume"),
                           (("--resume", "--lr", "1"), "begun: lr is 1.0 and was 0.0002")):
        with pytest.raises(SystemExit) as ended:
            main(words(tiny, data, tmp_path / "run", *flags))
        assert ended.value.code == 2 and message in capsys.readouterr().err
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    main(words(tiny, data, tmp_path / "run", "--resume", "--dry-run"))
    assert "nothing is written" in capsys.readouterr().out
    assert before == sorted(path.name for path in (tmp_path / "run").iterdir())


def test_a_terminated_run_goes_on_from_its_folder_alone(tiny, data, tmp_path, capsys, monkeypatch):
    out, straight = tmp_path / "run", tmp_path / "straight"
    monkeypatch.chdir(tmp_path)
    how = words("tiny", data.name, out)
    (tmp_path / "tiny").symlink_to(tiny)
    main(words(tiny, data, straight))
    ended = run_until_killed("SIGTERM", how)
    assert ended.returncode == 143 and "it can be resumed after step 7" in ended.stderr, ended.stderr
    assert steps(out / "checkpoint") == [7, 6]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out.rename(tmp_path / "moved")
    capsys.readouterr()
    main(["train", "--resume", "--out", str(tmp_path / "moved"), "--dry-run"])
    assert "7 of them done" in capsys.readouterr().out
    main(["train", "--resume", "--out", str(tmp_path / "moved")])
    assert "resumed after step 7 of " in capsys.readouterr().err
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "moved" / adapter).read_bytes() == (straight / adapter).read_bytes()


def test_what_is_changed_stays_changed(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_until_killed("SIGTERM", words(tiny, data, out)).returncode == 143
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--out", str(out), "--lr", "1e-3"])
    assert "give what was given then, or go on with the new: --changed lr (in Python" in capsys.readouterr().err
    main(["train", "--resume", "--out", str(out), "--lr", "1e-3", "--changed", "lr", "ask", "--ask", "Who?"])
    written = (out / "train.toml").read_text()
    assert "\nlr = 0.001\n" in written and "\nchanged" not in written
    assert json.loads((out / "config.json").read_text())["training"]["lr"] == 1e-3
    assert "Who?" not in capsys.readouterr().out        # what was not asked before has nothing to be compared with


def test_without_the_settings_of_the_run_it_says_where_they_would_be(tmp_path, capsys):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "BASE and DATA are missing; there is no " in said
    assert "run/train.toml, which --resume reads (a run that Python began has none): give what the run was" in said


def test_one_process_at_a_time(tiny, data, tmp_path, capsys):
    class Second(Observer):
        """Another terminal, in which the run that still goes on is resumed."""

        def on_step(self, record):
            if record.step == 4:
                with pytest.raises(SystemExit) as ended:
                    main(words(tiny, data, out, "--resume"))
                assert ended.value.code == 2
                said.append(capsys.readouterr().err.splitlines()[-1])

    import minitune as mt

    out, said = tmp_path / "run", []
    mt.train(mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2)), data, out=out, tokens=64, epochs=3, save_every=3,
             max_new_tokens=3, observers=[Second()], quiet=False)
    assert said == [f"minitune: {out}: another process trains this run; wait for it, or end it"]
    assert (out / "adapter").is_dir() and not (out / "checkpoint").exists()


def test_a_run_that_ends_before_its_first_step_leaves_nothing(tiny, data, tmp_path, monkeypatch):
    from minitune.api.examine import Examiner

    def impatient(*_):
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*was removed")
            patched.setattr(Examiner, "__call__", impatient)
            main(words(tiny, data, out, "--tensorboard"))
        assert ended.value.code == 130
    assert not (tmp_path / "new").exists() and not any((tmp_path / "empty").iterdir())
    main(words(tiny, data, tmp_path / "new"))
    before = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(words(tiny, data, tmp_path / "new"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()}


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
