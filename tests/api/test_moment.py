"""A chat template that writes the date: one moment for the whole run, also where it is resumed on another day."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta

import pytest

import minitune as mt
from minitune.data import tokenizer as tokenizers
from tests.api.test_resume import left_behind, train

TEMPLATE = ("{{ strftime_now('%d %b %Y %H:%M:%S') }}\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
            "{% endfor %}")


@pytest.fixture
def dated(tiny, tmp_path):
    """A model whose template writes the time, so that one second plays one day."""
    folder = shutil.copytree(tiny, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"Number {i}?"},
                                                     {"role": "assistant", "content": f"It is {i}."}]}) + "\n"
                            for i in range(12)))
    return path


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes a day further whenever it is looked at."""
    class Clock(datetime):
        days = 0

        @classmethod
        def now(cls, tz=None):
            Clock.days += 1
            return datetime(2026, 1, 1) + timedelta(days=Clock.days)

    monkeypatch.setattr(tokenizers, "datetime", Clock)
    monkeypatch.setattr("minitune.api.resume.datetime", Clock)
    return Clock


def test_a_run_is_resumed_on_another_day(dated, chats, tmp_path, clock):
    ask = [[{"role": "user", "content": "Number 3?"}]]
    train(dated, chats, tmp_path / "run", stop=2, ask=ask, tokens=128)
    begun = json.loads((tmp_path / "run" / "config.json").read_text())["now"]
    assert datetime.fromisoformat(begun) == datetime(2026, 1, 1) + timedelta(days=clock.days)
    train(dated, chats, tmp_path / "run", resume=True, ask=ask, tokens=128)
    clock.days = datetime.fromisoformat(begun).timetuple().tm_yday - 2
    train(dated, chats, tmp_path / "straight", ask=ask, tokens=128)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "straight")


def test_a_moment_can_be_set_and_counts(dated, chats, tmp_path):
    def day(number):
        model = mt.load(dated, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
        model.tokenizer.now = datetime(2026, 1, number)
        return model

    texts = [day(number).tokenizer.render_chat([{"role": "user", "content": "a"}])[:11] for number in (1, 2)]
    assert texts == ["01 Jan 2026", "02 Jan 2026"]
    mt.train(day(3), chats, out=tmp_path / "run", tokens=128, max_steps=1, ask=())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["now"] == "2026-01-03T00:00:00"


def test_data_of_another_day_that_was_read_before_is_told(dated, chats, tmp_path, clock):
    def stream():
        return mt.data.stream(chats, mt.load(dated, device="cpu").tokenizer, tokens=128, epochs=3)

    train(dated, stream(), tmp_path / "run", stop=2, tokens=128)
    told = r"the data is not what it was; .*Its chat template writes the date, for this run 2026-\S+: set"
    with pytest.raises(mt.InputError, match=rf"{told} tokenizer\.now to it before data is read$"):
        train(dated, stream(), tmp_path / "run", resume=True, tokens=128)


def test_afterwards_the_clock_goes_on(dated, chats):
    model = mt.load(dated, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    mt.train(model, chats, tokens=128, max_steps=1)
    assert model.tokenizer.now is None and model.tokenizer.writes_date


def test_a_damaged_moment_is_told(dated, chats, tmp_path):
    train(dated, chats, tmp_path / "run", stop=2, tokens=128)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "now": "yesterday"}))
    with pytest.raises(mt.InputError, match=r"config\.json: now is 'yesterday'; it must be a date and time"):
        train(dated, chats, tmp_path / "run", resume=True, tokens=128)
