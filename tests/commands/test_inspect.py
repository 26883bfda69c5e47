"""minitune inspect, as a user runs it: ledger, notes, lengths and samples on stdout, one error for bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from minitune.commands.inspect import Inspect
from minitune.config import Data
from minitune.errors import InputError
from tests.files import BASE, EXAMPLES


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"question": text, "answer": "yes"}) for text in texts), encoding="utf-8")
    return path


def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Inspect(BASE, EXAMPLES / "facts.jsonl", n=2).run()
    out = capsys.readouterr().out
    assert "Where the tokens go" in out and "an epoch: 50 samples" in out and "Lengths in tokens" in out
    assert out.count("«") == 2 and "minitune is a small trainer" in out and "\x1b" not in out


def test_long_samples_are_shown_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", ["short", "a longer question than that " * 4])
    fields = ("prompt=question", "completion=answer")
    Inspect(BASE, path, n=0, tokens=20, samples=Data(field_map=fields)).run()
    out = capsys.readouterr().out
    assert "note: 1 sample: longer than 20 tokens, so training refuses them: raise --tokens to" in out
    assert f"({path}:2)" in out and "too long" in out and "«" not in out
    Inspect(BASE, path, n=0, tokens=20, samples=Data(field_map=fields, long="split")).run()
    out = capsys.readouterr().out
    assert "split, no piece sees the one before it" in out and "refuses" not in out


def test_long_validation_samples_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ("prompt=question", "completion=answer")
    path = write(tmp_path / "a.jsonl", ["short", "brief"])
    held = write(tmp_path / "b.jsonl", ["one", "a longer question than that " * 4])
    Inspect(BASE, path, n=0, tokens=20, samples=Data(field_map=fields, valid=str(held))).run()
    before, _, after = capsys.readouterr().out.partition("Held out")
    assert "refuses" not in before and "note: 1 sample: longer than 20 tokens, so training refuses them" in after
    assert f"({held}:2)" in after


def test_samples_are_shown_as_training_sees_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 30, "completion": "yes"}))
    Inspect(BASE, path, tokens=20, samples=Data(long="truncate")).run()
    out = capsys.readouterr().out
    assert "20 tokens, 0 trained" in out and "yes" not in out.partition("Lengths")[2] and "«" not in out
    path.write_text(json.dumps({"text": "word " * 30}))
    Inspect(BASE, path, tokens=20, n=9, samples=Data(long="split")).run()
    shown = re.findall(r"a.jsonl:1: (\d+) tokens, (\d+) trained", capsys.readouterr().out)
    assert len(shown) > 1 and max(int(length) for length, _ in shown) == 20
    assert all(int(trained) == int(length) - 1 for length, trained in shown)


def test_the_seed_draws_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [f"question {i} {'word ' * i}" for i in range(10)])
    found = set()
    for seed in (0, 0, 1, 2, 3):
        settings = Data(field_map=("prompt=question", "completion=answer"), valid_split=0.2)
        Inspect(BASE, path, seed=seed, n=0, samples=settings).run()
        found.add(capsys.readouterr().out)
    assert 1 < len(found) < 5
    with pytest.raises(InputError, match=r"inspect: seed is 0\.5"):
        Inspect(BASE, path, seed=0.5).run()     # type: ignore[arg-type]


def test_what_is_held_out_has_a_ledger_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [f"question {i}" for i in range(10)])
    settings = Data(field_map=("prompt=question", "completion=answer"), valid_split=0.2)
    Inspect(BASE, path, samples=settings).run()
    out = capsys.readouterr().out
    assert "an epoch: 8 samples" in out and "Held out" in out and "an epoch: 2 samples" in out


def test_base_comes_first_as_in_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minitune.cli import main

    path = write(tmp_path / "a.jsonl", ["one", "two"])
    more = write(tmp_path / "b.jsonl", ["three", "<new> four"])
    fields = ["--field-map", "prompt=question", "completion=answer"]
    main(["inspect", str(BASE), str(path), *fields, "--mix", f"{more}=2", "--n", "0"])
    out = capsys.readouterr().out
    assert "an epoch: 6 samples" in out and "b.jsonl × 2" in out and "all files" in out
    longest = [int(re.search(r"longest (\d+)", out)[1])]       # type: ignore[index]
    main(["inspect", str(BASE), str(more), *fields, "--n", "0", "--add-tokens", "<new>"])
    longest.append(int(re.search(r"longest (\d+)", capsys.readouterr().out)[1]))        # type: ignore[index]
    assert longest[1] < longest[0]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), str(BASE), *fields])
    assert ended.value.code == 2 and "a.jsonl: no such folder" in capsys.readouterr().err


def test_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(InputError, match=r"a.jsonl:1: .*question"):
        Inspect(BASE, path).run()
    with pytest.raises(InputError, match="no such file"):
        Inspect(BASE, tmp_path / "none.jsonl").run()
    with pytest.raises(InputError, match="n is -1"):
        Inspect(BASE, path, n=-1).run()
    with pytest.raises(InputError, match="tokens is 1;"):
        Inspect(BASE, path, tokens=1).run()
