"""The demo's verdict: each check can fail on its own, and one failure is enough."""

from __future__ import annotations

import pytest
import torch

from minitune.demo import run as demo
from minitune.demo.questions import QUESTIONS
from minitune.errors import InputError
from minitune.report.tables import Compared
from tests.files import records


def _table(before: str = "Return a tensor.", after: str | None = None) -> list[Compared]:
    return [Compared(q.text, before, f"It {q.key}." if after is None else after, q.key) for q in QUESTIONS]


def _holds(table: list[Compared], held_after: float = 3.05, reloaded: str | None = None) -> list[bool]:
    seen = table[0].after if reloaded is None else reloaded
    return [ok for _, _, ok in demo.checks(table, 3.0, held_after, seen)]


def test_all_checks_hold_for_a_model_that_learned() -> None:
    assert _holds(_table()) == [True] * 4


def test_an_answer_known_before_fails() -> None:
    known = [Compared(QUESTIONS[0].text, QUESTIONS[0].key, QUESTIONS[0].key, QUESTIONS[0].key), *_table()[1:]]
    assert _holds(known)[:2] == [False, False]


def test_one_answer_without_its_key_fails() -> None:
    assert _holds([*_table()[:-1], _table(after="Return a tensor.")[-1]])[:2] == [True, False]


@pytest.mark.parametrize(("held_after", "ok"), [(3.09, True), (3.11, False), (float("nan"), False), (2.0, True)])
def test_the_held_out_loss_may_rise_a_little(held_after: float, ok: bool) -> None:
    assert _holds(_table(), held_after)[2] is ok


def test_an_adapter_that_answers_otherwise_fails() -> None:
    assert _holds(_table(), reloaded="Return a tensor.")[3] is False


def test_report_needs_every_check(capsys) -> None:
    assert demo.report([("a", "1", True), ("b", "2", True)]) is True
    assert demo.report([("a", "1", True), ("b", "2", False)]) is False
    assert "NO" in capsys.readouterr().out


def test_the_training_file_repeats_the_facts(tmp_path, monkeypatch) -> None:
    (tmp_path / "facts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "replay.jsonl").write_text('{"text": "c"}\n')
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    path = demo.write_training_file(tmp_path / "train.jsonl")
    assert records(path) == [{"prompt": "a", "completion": "b"}] * demo.FACT_REPEATS + [{"text": "c"}]


def test_a_missing_base_is_said_with_the_command_that_builds_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    with pytest.raises(InputError, match="make base"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(InputError, match="sees no GPU"):
        demo.run(tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_demo_is_overwritten(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "load", lambda *_, **__: pytest.fail("it was begun"))
    for name, content in (("notes.txt", "mine"), ("train.jsonl", '{"text": "mine"}\n'), ("train.jsonl", "")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=f"{folder}: holds files that are no earlier demo's; name another folder"):
            demo.run(folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, content)]
    with pytest.raises(InputError, match=r"notes\.txt: is a file; name a folder"):
        demo.run(tmp_path / "0" / "notes.txt")
    earlier = tmp_path / "earlier"
    for _ in range(2):      # empty, then with what the demo begins with
        earlier.mkdir(exist_ok=True)
        demo.check_out(earlier)
        demo.write_training_file(earlier / "train.jsonl")
    demo.check_out(tmp_path / "new")


@pytest.mark.timeout(900)
def test_the_demo_keeps_its_promise(tmp_path, capsys) -> None:
    """The whole job on the shipped base: what `make demo` runs and checks."""
    assert demo.run(tmp_path, device="cpu"), capsys.readouterr().out
    assert {"adapter", "loss.png", "metrics.jsonl", "train.jsonl"} <= {path.name for path in tmp_path.iterdir()}
