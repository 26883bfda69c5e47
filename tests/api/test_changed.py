"""mt.train(…, resume=True, changed=[…]): a run goes on with what the user names, and with nothing else that differs."""

from __future__ import annotations

import json
import shutil

import pytest

import minitune as mt
from minitune.report.folder import RunFolder
from minitune.training.checkpoint import steps
from tests.api.test_resume import LORA, left_behind, train
from tests.files import records, write_numbers


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(30))


def rates(run):
    return [record.lr for record in run.records]


def test_what_is_named_but_the_same_changes_nothing(tiny, data, tmp_path):
    expected = train(tiny, data, tmp_path / "a")
    train(tiny, data, tmp_path / "run", stop=3)
    run = train(tiny, data, tmp_path / "run", resume=True, changed=["lr", "data", "max_steps"])
    assert run.losses == expected.losses
    ours, theirs = left_behind(tmp_path / "run"), left_behind(tmp_path / "a")
    told = json.loads(ours.pop("config.json"))
    assert told == {**json.loads(theirs.pop("config.json")), "changed": ["lr", "data", "max_steps"]}
    assert ours == theirs


def test_another_rate_and_a_longer_run_count_from_here_on(tiny, data, tmp_path):
    out, new = tmp_path / "run", {"lr": 3e-3, "max_steps": 9, "schedule": "constant", "warmup": 0.0}
    before = train(tiny, data, tmp_path / "a")
    after = train(tiny, data, tmp_path / "b", **new)
    train(tiny, data, out, stop=3)
    run = train(tiny, data, out, resume=True, changed=list(new), **new)
    assert rates(run) == [*rates(before)[:3], *rates(after)[3:]] == [*rates(before)[:3], *[3e-3] * 6]
    assert run.losses[:4] == before.losses[:4] and run.losses[4:6] != before.losses[4:6]
    config = json.loads((out / "config.json").read_text())
    assert (config["total_steps"], config["training"]["lr"], config["changed"]) == (9, 3e-3, list(new))
    assert [line["step"] for line in records(out / "metrics.jsonl") if "loss" in line] == list(range(1, 10))


def test_what_was_changed_need_not_be_named_again(tiny, data, tmp_path):
    out = tmp_path / "run"
    train(tiny, data, out, stop=3)
    train(tiny, data, out, stop=4, lr=1e-3, resume=True, changed=("lr",))
    assert steps(out / "checkpoint")[0] == 4
    with pytest.raises(mt.InputError, match=r"lr is 0\.01 and was 0\.001"):
        train(tiny, data, out, resume=True)
    assert train(tiny, data, out, lr=1e-3, resume=True).end == "finished"


def test_what_was_changed_holds_for_a_process_that_is_killed_before_its_next_checkpoint(tiny, data, tmp_path):
    """Both checkpoints tell of it: the last one may be damaged by then."""
    out, kept = tmp_path / "run", tmp_path / "kept"
    train(tiny, data, out, stop=4, save_every=2)
    assert steps(out / "checkpoint") == [4, 2]

    class Killed:
        def on_step(self, record):
            shutil.copytree(out, kept, dirs_exist_ok=True)

    train(tiny, data, out, lr=1e-3, resume=True, changed=["lr"], observers=[Killed()])
    (kept / "checkpoint" / "step-4.safetensors").write_bytes(b"")
    run = train(tiny, data, kept, lr=1e-3, resume=True, changed=["clip"], clip=0.5)     # from step 2, as a note says
    assert rates(run)[2:] == [pytest.approx(rate / 10) for rate in rates(train(tiny, data, tmp_path / "a"))[2:]]
    assert json.loads((kept / "config.json").read_text())["changed"] == ["lr", "clip"]


def test_a_process_that_is_killed_before_its_files_tell_of_it_is_asked_once_more(tiny, data, tmp_path, monkeypatch):
    """Whatever it is given then is what its files say in the end."""
    def killed(*_):
        shutil.copytree(out, kept)
        raise KeyboardInterrupt

    for rate, changed in ((1e-3, ["lr"]), (1e-2, [])):
        out, kept = tmp_path / f"run-{rate}", tmp_path / f"kept-{rate}"
        train(tiny, data, out, stop=4)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "_write_settings", killed)
            with pytest.raises(KeyboardInterrupt):
                train(tiny, data, out, lr=1e-3, resume=True, changed=["lr"])
        if changed:
            with pytest.raises(mt.InputError, match=r"lr is 0\.001 and was 0\.01"):
                train(tiny, data, kept, lr=rate, resume=True)
        train(tiny, data, kept, lr=rate, resume=True, changed=changed)
        config = json.loads((kept / "config.json").read_text())
        assert config["training"]["lr"] == rate and config["changed"] == changed


def test_advice_names_what_was_named_already(tiny, data, tmp_path):
    train(tiny, data, tmp_path / "run", stop=3)
    with pytest.raises(mt.InputError, match=r"--changed lr max_steps \(in Python changed=\['lr', 'max_steps'\]\)$"):
        train(tiny, data, tmp_path / "run", resume=True, changed=["lr"], lr=1e-3, max_steps=9)


def test_a_base_of_another_shape_cannot_be_changed_to(tiny, data, tmp_path):
    shallow = shutil.copytree(tiny, tmp_path / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    train(tiny, data, tmp_path / "run", stop=3)
    with pytest.raises(mt.InputError, match=r"base\.norm_eps is 0\.001 and was .*; give what was given then$"):
        train(shallow, data, tmp_path / "run", resume=True, changed=["base"])


def test_new_data_is_read_from_where_the_old_one_stood(tiny, data, tmp_path):
    """Here the data that comes first is what differs, which is behind the run already; and its questions do."""
    out, batches = tmp_path / "run", list(mt.data.stream(data, mt.load(tiny).tokenizer, tokens=64))
    expected = train(tiny, batches, tmp_path / "a", epochs=1)
    train(tiny, batches, out, stop=2, epochs=1)
    mended = [batches[1], batches[1], *batches[2:]]
    run = train(tiny, mended, out, epochs=1, resume=True, changed=["data"], ask=["Who?"])
    assert run.losses == expected.losses
    assert [each.question for each in run.evaluations[-1].answers] == ["Who?"]


@pytest.mark.parametrize(("settings", "message"), [
    ({"changed": ["rank"]}, "train: changed has 'rank'; a run that goes on may have another lr, .* ask or objective$"),
    ({"changed": "lr"}, r"train: changed is 'lr'; give a list of names such as \['lr'\]"),
    ({"changed": ["lr"], "resume": False}, "changed is given, but no run is resumed; it goes with resume"),
    ({"changed": ["max_steps"], "max_steps": 2}, "run: 3 steps are done, and 2 are planned; give more epochs or"),
    ({"changed": ["lr"], "micro_batches": 2}, "micro_batches is 2 and was 1; give what was given then$"),
    ({"changed": ["base"], "how": {"lora": mt.LoRA(rank=3)}}, r"lora\.rank is 3 and was 2"),
])
def test_what_cannot_be_is_refused_and_nothing_is_lost(tiny, data, tmp_path, settings, message):
    out, settings = tmp_path / "run", {"resume": True, **settings}
    train(tiny, data, out, stop=3)
    before = left_behind(out)
    with pytest.raises(mt.InputError, match=message):
        train(tiny, data, out, settings.pop("how", {"lora": LORA}), **settings)
    assert left_behind(out) == before
