"""minitune train --requeue: one command that begins a run, goes on with it, begins it anew, or has nothing to do."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.training.checkpoint import steps
from minitune.training.runner import Runner
from tests.files import records, write_numbers

LAUNCH = Runner._launch


@pytest.fixture
def words(tiny, tmp_path):
    data = write_numbers(tmp_path / "data.jsonl", range(30))
    return ["train", str(tiny), str(data), "--out", str(tmp_path / "run"), "--tokens", "64", "--max-steps", "6",
            "--rank", "2", "--max-new-tokens", "2", "--save-every", "2", "--device", "cpu", "--requeue"]


def dies(monkeypatch, after):
    """The process, as far as it can be seen from here: nothing is saved, told or tidied up."""
    left = iter(range(after))

    def launch(self, *rest):
        if next(left, None) is None:
            self.checkpoints = None
            raise SystemExit(9)
        return LAUNCH(self, *rest)

    monkeypatch.setattr(Runner, "_launch", launch)
    monkeypatch.setattr("minitune.report.folder.RunFolder.on_end", lambda *_: None)


def test_the_same_command_again_and_again(words, tmp_path, monkeypatch, capsys):
    out, straight = tmp_path / "run", tmp_path / "straight"
    main([*words[:-1], "--out", str(straight)])
    with monkeypatch.context() as ending, pytest.raises(SystemExit):
        dies(ending, 1)
        main(words)
    assert not steps(out / "checkpoint") and (out / "config.json").is_file() and not (out / "adapter").exists()
    with monkeypatch.context() as ending, pytest.raises(SystemExit):
        dies(ending, 5)
        main(words)         # it begins anew
    assert steps(out / "checkpoint") and len(records(out / "metrics.jsonl")) >= 4
    main(words)             # it goes on
    names = ("adapter/adapter_model.safetensors", "answers.jsonl")
    assert all((out / name).read_bytes() == (straight / name).read_bytes() for name in names)
    assert (out / "train.toml").read_text() == (straight / "train.toml").read_text()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main(words)
    assert capsys.readouterr().out == f"{out}: the run has ended, nothing is left to do\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_is_no_run_of_this_command(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as ending, pytest.raises(SystemExit):
        dies(ending, 3)
        main(words)
    for more, said in ((["--lr", "1e-5"], "lr is 1e-05 and was 0.0002"), (["--resume"], "requeue is given, which"),
                       (["--dry-run"], "and dry_run; leave one out")):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    for path in (out / "checkpoint").iterdir():
        path.unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "notes.txt lies there, which is no run's" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine" and (out / "metrics.jsonl").exists()
