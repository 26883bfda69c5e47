"""mt.train(…, resume=True): the same adapter, losses, files as of a run that was not interrupted; or one message."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import warnings

import pytest
import torch

import minitune as mt
from minitune.report.claim import claimed
from minitune.training.checkpoint import steps
from minitune.training.run import Observer
from tests.files import records, write_numbers

UNEQUAL = ("seconds", "tokens_per_second", "memory", "evaluation_seconds")
"""What of metrics.jsonl is measured, and never twice the same."""


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(30))


def model(folder, how=None):
    return mt.load(folder, device="cpu", **{"dtype": "float32", **(how or {"lora": mt.LoRA(rank=2)})})


class Stop(Observer):
    """Ctrl-C after a step."""

    def __init__(self, after):
        self.after = after

    def on_step(self, record):
        if record.step == self.after:
            raise KeyboardInterrupt


def train(folder, data, out, how=None, stop=None, **settings):
    """A run, or what is left of one that is stopped: None."""
    settings = {"tokens": 64, "epochs": 3, "lr": 1e-2, "ask": ["Number 3 is"], "max_new_tokens": 3, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stop is None:
            return mt.train(model(folder, how), data, out=out, **settings)
        with pytest.raises(KeyboardInterrupt):
            mt.train(model(folder, how), data, out=out, observers=[Stop(stop)], **settings)
    return None


def left_behind(out):
    """The files of a run but for what is measured, and what is drawn from that."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found = {name: content for name, content in found.items() if name not in ("loss.png", "environment.json")}
    return found | {"metrics.jsonl": [{name: value for name, value in line.items() if name not in UNEQUAL}
                                      for line in records(out / "metrics.jsonl")]}


LORA = mt.LoRA(rank=2)
WAYS = {
    "bf16": ({"lora": LORA, "dtype": "bfloat16"}, {}),
    "dropout": ({"lora": mt.LoRA(rank=2, dropout=0.3)}, {"micro_batches": 2}),
    "8bit": ({"lora": LORA}, {"moments": "8bit", "micro_batches": 2}),
    "sgd": ({"lora": LORA}, {"optimizer": "sgd"}),
    "dora": ({"lora": mt.LoRA(rank=2, dora=True)}, {}),
    "lora+": ({"lora": mt.LoRA(rank=2, lr_ratio=4.0)}, {}),
    "layer": ({"train": "last:1", "dtype": "bfloat16"}, {}),
    "nf4": ({"lora": LORA, "quant": "nf4"}, {}),
    "tokens": ({"lora": LORA, "add_tokens": ["<tool>"]}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_leaves_what_one_that_was_not_interrupted_does(tiny, data, tmp_path, way):
    how, settings = WAYS[way]
    valid = write_numbers(tmp_path / "valid.jsonl", range(40, 44))
    settings = {**settings, "valid": valid, "evaluate_every": 3, "save_every": 2}
    expected = train(tiny, data, tmp_path / "a" / "run", how, **settings)
    for out, stops in ((tmp_path / "b" / "run", (5,)), (tmp_path / "c" / "run", (1, 3))):
        for place, stop in enumerate(stops):
            train(tiny, data, out, how, stop, resume=place > 0, **settings)
            assert (out / "checkpoint" / f"step-{stop}.safetensors").is_file()
        run = train(tiny, data, out, how, resume=True, **settings)
        assert run.losses == expected.losses and run.best.loss == expected.best.loss
        assert [(e.step, e.loss, e.answers) for e in run.evaluations] == [
            (e.step, e.loss, e.answers) for e in expected.evaluations]
        found, wanted = left_behind(out), left_behind(tmp_path / "a" / "run")
        assert found.keys() == wanted.keys()
        assert {name for name in found if found[name] != wanted[name]} == set()
        assert (run.adapter, run.best_adapter) == tuple(
            out / path.name for path in (expected.adapter, expected.best_adapter))
        assert (out / "loss.png").exists() and not (out / "checkpoint").exists()


def test_what_came_after_the_checkpoint_of_a_killed_run_is_done_again(tiny, data, tmp_path):
    out, killed = tmp_path / "run", tmp_path / "killed"
    settings = {"save_every": 4, "valid": data, "evaluate_every": 3, "log_every": 2}
    expected = train(tiny, data, tmp_path / "a", **settings)

    class Kill(Observer):
        def on_step(self, record):
            if record.step == 8:
                shutil.copytree(out, killed)

    train(tiny, data, out, observers=[Kill()], **settings)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')       # torn
    assert steps(killed / "checkpoint") == [4]
    assert [line["step"] for line in records(out / "metrics.jsonl")][:6] == [0, 1, 2, 3, 4, 6]
    run = train(tiny, data, killed, resume=True, **settings)
    assert run.losses == expected.losses and left_behind(killed) == left_behind(tmp_path / "a")


def test_lists_of_batches_and_streams_go_on_too(tiny, data, tmp_path):
    tokenizer = model(tiny).tokenizer
    for name, make in (("list", lambda: list(mt.data.stream(data, tokenizer, tokens=64))),
                       ("stream", lambda: mt.data.stream({data: 0.5}, tokenizer, tokens=64, epochs=3)),
                       ("samples", lambda: records(data))):
        expected = train(tiny, make(), tmp_path / f"a-{name}")
        train(tiny, make(), tmp_path / f"b-{name}", stop=4)
        run = train(tiny, make(), tmp_path / f"b-{name}", resume=True)
        assert run.losses == expected.losses and len(run.losses) > 5
        assert left_behind(tmp_path / f"a-{name}") == left_behind(tmp_path / f"b-{name}")


def test_some_settings_may_be_others(tiny, data, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved.jsonl"
    expected = train(tiny, data, tmp_path / "a", valid=data)
    train(tiny, data, out, stop=3, valid=data)
    data.rename(moved)
    run = train(tiny, moved, out, resume=True, valid=moved, log_every=5, save_every=3, evaluate_every=2)
    assert run.losses == expected.losses
    steps = [line["step"] for line in records(out / "metrics.jsonl") if "loss" in line]
    assert steps == [1, *range(5, run.info.total_steps, 5), run.info.total_steps]


@pytest.mark.parametrize(("how", "settings", "message"), [
    ({}, {"lr": 2e-2}, r"begun: lr is 0\.02 and was 0\.01; give what was given then, or go on with the new: "
     r"--changed lr \(in Python changed=\['lr'\]\)$"),
    ({}, {"epochs": 4, "clip": 2.0}, r"begun: epochs is 4 and was 3; clip is .*; give .*: --changed epochs clip \(in"),
    ({}, {"epochs": 4, "clip": 2.0, "changed": ["epochs"]}, r"begun: clip is .*--changed epochs clip \(in"),
    ({}, {"epochs": 4, "seed": 1}, r"begun: epochs is .*; seed is 1 and was 0; .*; give what was given then$"),
    ({}, {"seed": 1, "micro_batches": 2, "clip": 2.0, "weight_decay": 0.1, "min_lr_ratio": 0.1,
          "schedule": "constant"}, r"micro_batches .*min_lr_ratio is 0\.1 and was not given; .*; and [12] more; give"),
    ({"lora": mt.LoRA(rank=3)}, {}, r"lora\.rank is 3 and was 2"),
    ({"lora": LORA, "dtype": "bfloat16"}, {}, "dtype is 'bfloat16' and was 'float32'"),
    ({"lora": LORA, "quant": "nf4"}, {}, "begun: quant is 'nf4' and was not given; give"),
    ({"train": "norms"}, {}, r"other weights are trained than then: model\.layers\.0\.\S+ is, and \d+ more differ"),
    ({}, {"ask": ["Who?"]}, r"ask is \['Who\?'\] and was \['Number 3 is'\]"),
    ({}, {"data": "other.jsonl", "ask": ["Who?"]}, "begun: the data is not what it was; give"),
    ({}, {"valid": "data.jsonl"}, "begun: the validation data is not what it was; give"),
    ({}, {"data": "other.jsonl"}, "begun: the data is not what it was; give"),
    ({}, {"objective": mt.Model.loss_sum}, "objective is 'Model.loss_sum' and was not given"),
    ({}, {"objective": functools.partial(mt.Model.loss_sum, beta=0.1)}, r"objective is 'Model.loss_sum\(beta=0.1\)'"),
    ({}, {"data": {"data.jsonl": 0.5}}, r"data: files\[0\]\.share is 0\.5 and was 1"),
])
def test_another_run_is_refused_by_its_field_and_nothing_is_lost(tiny, data, tmp_path, monkeypatch, how, settings,
                                                               message):
    monkeypatch.chdir(tmp_path)
    write_numbers(tmp_path / "other.jsonl", range(100, 130))
    train(tiny, data, tmp_path / "run", stop=3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    settings = dict(settings)
    with pytest.raises(mt.InputError, match=message) as refused:
        train(tiny, settings.pop("data", data), tmp_path / "run", how, resume=True, **settings)
    assert str(refused.value).startswith(f"{tmp_path / 'run'}: cannot be resumed otherwise than it was begun: ")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_where_there_is_nothing_to_resume(tiny, data, tmp_path):
    def refused(out, **settings):
        with pytest.raises(mt.InputError) as found:
            train(tiny, data, out, **settings)
        return str(found.value)

    out = tmp_path / "run"
    assert refused(None, resume=True) == "train: resume needs out, the folder of the run that goes on"
    assert refused(out, resume="run").startswith("train: resume is 'run'; it must be true or false")
    assert refused(out, resume=True) == f"{out}: there is no run to resume; begin it without resume"
    assert "is not the folder of a run" in refused(tiny.parent, resume=True)
    assert "save_every is 3, but there is no folder" in refused(None, save_every=3)
    train(tiny, data, out, stop=3)
    assert refused(out).startswith(f"{out} exists already, with a run that did not end: go on with it (--resume, in")
    assert train(tiny, data, out, resume=True).end == "finished"
    assert refused(out, resume=True).startswith(f"{out}: the run has ended and left no checkpoint")
    (out / "adapter").rename(out / "elsewhere")
    assert refused(out, resume=True).startswith(f"{out}: the run came to its end, but what it trained was not written")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]))
    assert refused(out, resume=True).startswith(f"{out}: holds no checkpoint to resume from: the run was killed before")


def test_an_iterator_has_no_position(tiny, data, tmp_path):
    batches = list(mt.data.stream(data, model(tiny).tokenizer, tokens=64))
    with pytest.raises(mt.InputError, match=r"save_every is 2, but the data is a list_iterator, whose position"):
        train(tiny, iter(batches), tmp_path / "run", save_every=2, max_steps=4)
    assert not (tmp_path / "run").exists()
    train(tiny, iter(batches), tmp_path / "run", stop=2, max_steps=4)       # keeps the adapter alone
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "checkpoint").exists()
    train(tiny, batches, tmp_path / "other", stop=2, max_steps=4)
    with pytest.raises(mt.InputError, match=r"resume is True, but the data is a list_iterator"):
        train(tiny, iter(batches), tmp_path / "other", resume=True, max_steps=4)


def test_a_divergence_leaves_the_weights_of_the_last_checkpoint(tiny, data, tmp_path):
    out = tmp_path / "run"
    train(tiny, data, tmp_path / "a", stop=2)
    trained = model(tiny)

    class Spoil(Observer):
        def on_step(self, record):
            if record.step == 3:
                trained.trainable_parameters()[0].data.fill_(float("nan"))

    with pytest.raises(mt.TrainingDiverged, match=f"checkpoint after step 2 .* are saved in {out / 'adapter'}: go on"):
        mt.train(trained, data, out=out, tokens=64, epochs=3, lr=1e-2, save_every=2, observers=[Spoil()],
                 ask=["Number 3 is"], max_new_tokens=3)
    saved = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "a", out)]
    assert saved[0] == saved[1] and (out / "checkpoint").is_dir()


@pytest.mark.parametrize(("damaged", "restored", "said"), [
    ((4,), 2, "the checkpoint after step 4 is damaged: what is saved is from the one before it, after step 2"),
    ((2, 4), None, r"no checkpoint can be read, so nothing is saved: .*step-4\.safetensors: its SHA-256 is not")])
def test_a_divergence_says_which_checkpoint_was_damaged(tiny, data, tmp_path, damaged, restored, said):
    out, trained, runs = tmp_path / "run", model(tiny), []

    class Spoil(Observer):
        def on_step(self, record):
            if record.step == 5:
                trained.trainable_parameters()[0].data.fill_(float("nan"))
                for number in damaged:
                    (out / "checkpoint" / f"step-{number}.safetensors").write_bytes(b"")

        def on_end(self, run):
            runs.append(run)

    with pytest.raises(mt.TrainingDiverged, match="The trained weights are spoilt") as ended:
        mt.train(trained, data, out=out, tokens=64, epochs=3, lr=1e-2, save_every=2, observers=[Spoil()], ask=())
    assert runs[0].restored == restored and (out / "adapter").is_dir() is (restored is not None)
    assert [re.search(said, note) is not None for note in ended.value.__notes__] == [True]


def test_another_base_is_told_by_its_weights_and_the_same_may_lie_elsewhere(tiny, tmp_path):
    """Zeros in one linear, under the same name; a copy under another."""
    data, out = write_numbers(tmp_path / "data.jsonl", range(20)), tmp_path / "run"
    settings = {"tokens": 64, "max_steps": 4, "save_every": 2, "out": out, "ask": (), "quiet": True}

    class Stop(Observer):
        def on_step(self, record):
            if record.step == 3:
                raise KeyboardInterrupt

    def model(folder):
        return mt.load(folder, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))

    with pytest.raises(KeyboardInterrupt):
        mt.train(model(tiny), data, observers=[Stop()], **settings)
    other = model(tiny)
    with torch.no_grad():
        other.network.projections()[-1].weight[5:9].zero_()
    with pytest.raises(mt.InputError, match="otherwise than it was begun: the base is not what it was; give"):
        mt.train(other, data, resume=True, **settings)
    assert mt.train(model(shutil.copytree(tiny, tmp_path / "moved")), data, resume=True, **settings).end == "finished"


def test_one_that_comes_too_late_changes_nothing(tiny, data, tmp_path):
    """Two resume the same run: what the second one finds is held by the first, and stays as it is."""
    out = tmp_path / "run"
    train(tiny, data, out, stop=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with claimed(out), pytest.raises(mt.InputError, match="another process trains this run"):
        train(tiny, data, out, resume=True)
    new = tmp_path / "new"
    with claimed(new), pytest.raises(mt.InputError, match="another process trains this run"):
        train(tiny, data, new)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} and not new.exists()


def test_a_start_that_fails_half_way_can_be_tried_again(tiny, data, tmp_path, monkeypatch):
    from minitune.checkpoint import files

    replace, done = os.replace, []

    def full(*names):
        done.append(names)
        if len(done) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(names[1]))
        replace(*names)

    class Others(Observer):
        """An observer of the user's, with files of its own."""

        def on_start(self, info):
            (tmp_path / "mine" / "tensorboard").mkdir()
            (tmp_path / "mine" / "tensorboard" / "a.txt").write_text("mine")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(mt.InputError, match="No space left"):
        patched.setattr(files.os, "replace", full)
        train(tiny, data, tmp_path / "p" / "q")
    assert len(done) == 2 and not (tmp_path / "p").exists()
    with pytest.raises(KeyboardInterrupt):
        mt.train(model(tiny), data, out=tmp_path / "mine", tokens=64, observers=[Others()], quiet=True)
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["tensorboard", "a.txt"]
    assert train(tiny, data, tmp_path / "p" / "q").end == "finished"


@pytest.mark.parametrize(("lora", "way"), [(True, "run/adapter has what was trained before, and can be --adapter of"),
                                           (False, "run/model has what was trained before, and can be its BASE of")])
def test_where_no_checkpoint_is_whole_what_was_saved_is_named(tiny, data, tmp_path, lora, way):
    how = {"tokens": 64, "out": tmp_path / "run", "quiet": True}
    model = mt.load(tiny, lora=mt.LoRA(rank=2)) if lora else mt.load(tiny, train="norms")
    with pytest.raises(KeyboardInterrupt):
        mt.train(model, data, observers=[Stop(3)], **how)
    for path in (tmp_path / "run" / "checkpoint").glob("*.json"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(mt.InputError, match=rf"step-3\.json: is not valid JSON: .*; begin anew in .*{way} the new run"):
        mt.train(model, data, resume=True, **how)


def test_a_disk_that_does_not_answer_is_no_damage(tiny, data, tmp_path, monkeypatch):
    train(tiny, data, tmp_path / "run", stop=3)
    (tmp_path / "run" / "checkpoint" / "step-3.safetensors").chmod(0)
    opened = os.open

    def denied(path, *how, **more):
        if str(path).endswith(".safetensors") and "checkpoint" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(os, "open", denied)         # root may read all
    with pytest.raises(mt.InputError, match="Permission denied") as refused:
        train(tiny, data, tmp_path / "run", resume=True)
    assert "damaged" not in str(refused.value) and "new run" not in str(refused.value)
