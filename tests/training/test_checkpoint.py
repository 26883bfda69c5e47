"""A damaged checkpoint is refused by the name of its file, before a run begins."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from minitune.checkpoint.files import json_bytes
from minitune.checkpoint.writer import write_safetensors
from minitune.config import Training
from minitune.errors import InputError
from minitune.training import checkpoint
from minitune.training.checkpoint import FORMAT, OWN, read, remove, steps
from minitune.training.run import EvaluationRecord, SampleAnswer
from tests.training.stopping import Stop, checkpoints, data, train

MEMORY = Path("/proc/self/mem")


def _truncate(folder):
    path = folder / "step-3.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _change(**fields):
    def change(folder):
        path = folder / "step-3.json"
        content = {**json.loads(path.read_text()), **fields}
        del content[OWN]
        path.write_bytes(json_bytes({**content, OWN: hashlib.sha256(json_bytes(content)).hexdigest()}))

    return change


def _replace(old, new):
    def replace(folder):
        path = folder / "step-3.json"
        path.write_text(path.read_text().replace(old, new))

    return replace


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
    (_truncate, "step-3.safetensors", "its SHA-256 is not"),
    (lambda folder: (folder / "step-3.safetensors").unlink(), "step-3.safetensors", "there is no such file"),
    (lambda folder: (folder / "step-3.json").write_text("{"), "step-3.json", "is not valid JSON.*; begin anew in"),
    (lambda folder: (folder / "step-3.json").write_text("[]"), "step-3.json", r"its format is \[\]"),
    (lambda folder: (folder / "step-3.json").unlink(), "", "holds no checkpoint; begin anew in another folder"),
    (_change(format=1), "step-3.json", f"its format is 1; this version of minitune goes on from format {FORMAT} alone"),
    (_replace('"micro_batches": 3', '"micro_batches": 4'), "step-3.json", "its SHA-256 is not the one that it has as"),
    (_replace("a test", "a text"), "step-3.json", "its SHA-256 is not the one that it has as own_sha256, so some of"),
    (_replace(OWN, "other"), "step-3.json", "its SHA-256 is not the one that it has as own_sha256"),
    (_change(sha256=None), "step-3.json", "sha256 is None"),
    (_change(step="3"), "step-3.json", "step is '3', not that of its name"),
    (_change(step=2), "step-3.json", "step is 2, not that of its name"),
    (_change(micro_batches=2), "step-3.json", "micro_batches is 2"),
    (_change(run=None), "step-3.json", "run or evaluations is missing"),
    (_change(evaluations=[{"step": 1}]), "step-3.json", "which is no evaluation"),
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


def _flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def _unreadable(path):
    """A file whose bytes the disk does not give."""
    if not MEMORY.exists():
        pytest.skip("no regular file here that cannot be read")
    path.unlink()
    path.symlink_to(MEMORY)     # its first page is never there: EIO


@pytest.mark.parametrize(("end", "damage"), [("safetensors", _flip), ("safetensors", lambda path: path.unlink()),
                                             ("json", _flip), ("json", lambda path: path.write_bytes(b"")),
                                             ("safetensors", _unreadable), ("json", _unreadable)])
def test_where_the_newer_checkpoint_is_damaged_the_run_goes_on_from_the_older_and_says_so(fakes, tmp_path, end, damage):
    training = Training(lr=0.05, epochs=2, save_every=3)
    folder, straight, other, heard = tmp_path / "checkpoint", fakes.TinyModel(), fakes.TinyModel(), Stop(99)
    expected = train(fakes, straight, data(fakes), training)
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), training, observers=[Stop(7, ValueError)],
              checkpoints=checkpoints(tmp_path))
    assert steps(folder) == [7, 6]
    damage(folder / f"step-7.{end}")
    saved, notes = read(folder), []
    assert saved.step == 6 and saved.note.startswith(f"{folder / 'step-7'}.") and "anew" not in saved.note
    assert saved.note.endswith("; the run goes on from the checkpoint before it, of step 6")
    heard.on_note = notes.append
    run = train(fakes, other, data(fakes), training, start=saved, observers=[heard],
                checkpoints=checkpoints(tmp_path, saved.step))
    assert notes == [saved.note] and run.losses == expected.losses
    assert torch.equal(other.A, straight.A) and torch.equal(other.B, straight.B)
    assert steps(folder) == [9, 6]
    for path in (folder / "step-9.safetensors", folder / "step-6.safetensors"):
        _flip(path)
    with pytest.raises(InputError, match=r"step-9\.safetensors: its SHA-256 is .*; begin anew in another folder"):
        read(folder)


@pytest.mark.parametrize("damaged", [_flip, lambda path: os.truncate(path, path.stat().st_size - 1),
                                     lambda path: path.unlink()], ids=["a bit", "short", "gone"])
@pytest.mark.parametrize("full", [False, True])
def test_a_damaged_checkpoint_gives_way_and_the_whole_one_before_it_stays(fakes, tmp_path, monkeypatch, full, damaged):
    """Also where the next one cannot be written. A bit is found where the bytes are summed: when one is read, and where
    a disk has room for one alone."""
    folder, training, damage = tmp_path / "checkpoint", Training(lr=0.05, epochs=2, save_every=2), Stop(7, ValueError)
    written, stopped = [], damage.on_step

    def on_step(record):
        if record.step == 7 and not full:
            assert steps(folder) == ([6, 4] if damaged is _flip else [6, 2])
        if record.step == 5:
            damaged(folder / "step-4.safetensors")
            if full:
                monkeypatch.setattr(checkpoint, "write_safetensors", no_room)
        stopped(record)

    def no_room(*_):
        written.append(steps(folder))
        raise OSError(28, "No space left on device")

    damage.on_step = on_step
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), training, observers=[damage], checkpoints=checkpoints(tmp_path))
    assert steps(folder) == ([2] if full else [7, 6]) and read(folder).step == (2 if full else 7)
    assert written[:2] == ([[4, 2], [2]] if full else [])


def test_on_a_disk_without_room_for_three_the_older_one_goes_first(fakes, tmp_path, monkeypatch):
    folder, write = tmp_path / "checkpoint", write_safetensors
    tried = []

    def narrow(*given):
        tried.append(steps(folder))
        if len(tried[-1]) > 1:
            raise OSError(28, "No space left on device")
        return write(*given)

    monkeypatch.setattr(checkpoint, "write_safetensors", narrow)
    train(fakes, fakes.TinyModel(), data(fakes), Training(save_every=1), checkpoints=checkpoints(tmp_path))
    assert tried == [[], [1], [2, 1], [2], [3, 2], [3]] and steps(folder) == [4, 3] and read(folder).step == 4


def test_one_that_could_not_be_read_once_does_not_come_back(fakes, tmp_path):
    """The run went on from the older one: the newer one is of steps that are done again, perhaps otherwise."""
    folder, how = tmp_path / "checkpoint", Training(save_every=3, epochs=2)
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), how, observers=[Stop(6, ValueError)],
              checkpoints=checkpoints(tmp_path))
    assert steps(folder) == [6, 3]
    (folder / "step-6.json").rename(tmp_path / "away")
    saved = read(folder)
    (tmp_path / "away").rename(folder / "step-6.json")
    newer, kept = (folder / "step-6.json").read_bytes(), checkpoints(tmp_path, saved.step)
    kept._about = lambda: {"purpose": "another"}
    kept.accept()
    assert (folder / "step-6.json").read_bytes() == newer and read(folder).about == {"purpose": "a test"}
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), how, start=saved, observers=[Stop(4, ValueError)],
              checkpoints=kept)
    assert steps(folder) == [4, 3] and {read(folder).step} == {4}
    assert {path.stem for path in folder.iterdir()} == {"step-4", "step-3"}


def test_nothing_is_written_where_nothing_changed(fakes, tmp_path):
    """Not by Ctrl-C before the first step of a run that goes on, and not since it goes on."""
    folder, how = tmp_path / "checkpoint", Training(save_every=2, epochs=2)
    with pytest.raises(ValueError):
        train(fakes, fakes.TinyModel(), data(fakes), how, observers=[Stop(4, ValueError)],
              checkpoints=checkpoints(tmp_path))
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    heard = Stop(99)

    def on_resume(run):
        raise KeyboardInterrupt

    for heard.on_resume in (on_resume, lambda run: checkpoints(tmp_path, 4).accept() or on_resume(run)):
        with pytest.raises(KeyboardInterrupt):
            train(fakes, fakes.TinyModel(), data(fakes), how, start=read(folder), observers=[heard],
                  checkpoints=checkpoints(tmp_path, 4))
        assert heard.run.checkpoint == 4 and steps(folder) == [4, 2]
        assert before == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_what_somebody_else_keeps_beside_the_checkpoints_stays(fakes, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "mine").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    train(fakes, fakes.TinyModel(), data(fakes), Training(save_every=1), checkpoints=checkpoints(tmp_path))
    assert steps(folder) == [4, 3]
    remove(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "notes.txt"]


def test_whatever_the_model_answered_can_be_read_again(fakes, tmp_path):
    answers = (SampleAnswer(question="?", answer=", " * 1_100_000 + "\u2028\x00\ufffd"),)

    def asked(step, end):
        return EvaluationRecord(step=step, seconds=0.1, answers=answers)

    with pytest.raises(KeyboardInterrupt):
        train(fakes, fakes.TinyModel(), data(fakes), Training(), observers=[Stop(3)], evaluate=asked,
              checkpoints=checkpoints(tmp_path))
    assert read(tmp_path / "checkpoint").evaluations[0].answers == answers
