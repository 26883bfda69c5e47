"""take_turns: a rival's peak of memory is that of a process as its users run it, and no failure loses the rounds."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import tables_text, turns
from benchmarks.harness import Answer, WorkerError

TOLD = argparse.Namespace(warmup=1, rounds=2, steps=2, attempts=1, void_share=0.05)


class Scripted:
    """A worker in whose process freed memory is kept or given back; ``fails``: what its words say that it cannot do."""

    open = 0

    def __init__(self, *words: str) -> None:
        self.fails, self.falls = set(words), 3.0
        Scripted.open += 1

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        Scripted.open -= 1

    def ask(self, command: str, n: int = 0, keep: bool = True) -> Answer:
        if ("apart" if not keep else "steps" if self.falls == 3.0 else "") in self.fails:
            raise WorkerError("Killed")
        self.falls -= 1.0
        peak = 1000 if keep else 900
        return Answer({"seconds": [0.5] * n, "losses": [self.falls] * n, "grad_norm": 1.0, "memory": {"peak": peak}},
                      1.0, 0.0, peak)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "Worker", Scripted)
    monkeypatch.setattr(turns, "say", lambda text: None)


def test_a_rivals_peak_is_measured_apart_and_ours_is_that_of_its_turns(workers: None) -> None:
    found, _ = turns.take_turns({"ours": [], "eager": [], "none": ["steps"]}, 100, TOLD)
    assert found["ours"]["memory"] == {"peak": 1000, "anonymous_peak": 1000} and "memory_kept" not in found["ours"]
    assert found["eager"]["memory"] == {"peak": 900, "anonymous_peak": 900}
    assert found["eager"]["memory_kept"] == {"peak": 1000, "anonymous_peak": 1000}
    assert found["none"] == {"failed": "Killed"} and Scripted.open == 0
    assert found["eager"]["tokens_per_s"]["median"] == 200.0 and len(found["eager"]["turns"]) == 3


def test_a_rival_that_fails_then_keeps_its_rounds_and_the_table_says_so(workers: None) -> None:
    found, _ = turns.take_turns({"ours": [], "eager": ["apart"]}, 100, TOLD)
    assert found["eager"]["peak_failed"] == "Killed" and found["eager"]["memory"]["peak"] == 1000
    assert found["eager"]["tokens_per_s"]["median"] == 200.0 and Scripted.open == 0
    raw: dict[str, Any] = {"when": "2026-01-02", "kind": "train", "settings": turns.SETTINGS, "sides": found,
                           "machine": {"flags": [], "cores": 2, "cpu": "x", "gpus": [], "versions": {}, "commit": "a",
                                       "dirty": False}}
    said = "that of its timed process is given"
    assert said in tables_text.where(raw) and said not in tables_text.where({**raw, "sides": {}})
