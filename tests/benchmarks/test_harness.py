"""The benchmark harness: its statistics, its rule for void runs, its workers and raw files."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import time
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Answer, CpuTicks, Worker, WorkerError, ask_quietly, other_share, parse_stat, percentile

STAT = """cpu  100 10 50 800 20 3 7 5 60 0
cpu0 50 5 25 400 10 2 4 2 30 0
intr 1
"""


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], [0.1 * i * i for i in range(17)]])
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))
    assert percentile(values, 0.0) == min(values)
    assert percentile(values, 1.0) == max(values)
    if len(values) > 1:
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        found = harness.summary(values)
        assert [found["p20"], found["p80"]] == pytest.approx([fifths[0], fifths[3]])


def test_a_summary_of_nothing_has_no_figures() -> None:
    assert harness.summary([]) == {"n": 0}
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_proc_stat_counts_stolen_time_as_busy_and_guests_once() -> None:
    total, busy = parse_stat(STAT)
    assert total == 100 + 10 + 50 + 800 + 20 + 3 + 7 + 5
    assert total - busy == 800 + 20


def test_the_share_of_others_is_what_the_watched_tree_did_not_use() -> None:
    before = CpuTicks(total=1000, busy=500, own=100)
    assert other_share(before, CpuTicks(1200, 690, 280)) == pytest.approx(10 / 200)
    assert other_share(before, CpuTicks(1200, 650, 260)) == 0.0  # rounding of ticks must not go below zero
    assert other_share(before, before) == 0.0


@pytest.mark.parametrize(("share", "void"), [(0.0, False), (0.05, False), (0.051, True), (0.5, True)])
def test_a_run_is_void_above_five_percent(share: float, void: bool) -> None:
    assert Answer({}, 1.0, share, 0).void() is void


class Scripted:
    """A worker whose runs meet the given shares of foreign CPU."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def ask(self, command: str, **arguments: object) -> Answer:
        return Answer({"command": command, **arguments}, 1.0, self.shares.pop(0), 0)


def test_void_runs_are_repeated_and_kept_as_void() -> None:
    answers = ask_quietly(Scripted(0.4, 0.06, 0.01, 0.0), "steps", attempts=5, n=2)  # type: ignore[arg-type]
    assert [answer.void() for answer in answers] == [True, True, False]
    assert answers[-1].value == {"command": "steps", "n": 2}
    given_up = ask_quietly(Scripted(0.4, 0.3, 0.2, 0.1), "steps", attempts=3)  # type: ignore[arg-type]
    assert [answer.void() for answer in given_up] == [True, True, True]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_the_own_tree_is_seen_working() -> None:
    before = harness.tree_ticks(os.getpid())
    until = time.process_time() + 0.15
    while time.process_time() < until:
        pass
    spent = harness.tree_ticks(os.getpid()) - before
    assert 10 <= spent <= 100  # 0.15 s are 15 ticks of 10 ms
    found = harness.memory()
    assert found["resident_peak"] > 0.9 * found["resident"] > 2**20  # the kernel counts both only roughly
    assert 0 < found["anonymous"] < found["resident"]


WORKER = """
import os, time
from benchmarks.harness import serve
def grow(mib, seen):
    held = bytearray(os.urandom(2**20)) * mib
    while not os.path.exists(seen):
        time.sleep(0.01)
    return {"n": len(held)}
def fail():
    raise ValueError("wrong input")
def prepare():
    print("noise of a library")
    return {"square": lambda n: {"n": n * n}, "grow": grow, "fail": fail, "die": lambda: os._exit(3),
            "wait": lambda: time.sleep(600)}
serve(prepare)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    (tmp_path / "toy_worker.py").write_text(WORKER)
    places = os.pathsep.join([str(tmp_path), str(harness.ROOT)])
    return Worker("toy_worker", env={"PYTHONPATH": places})


def test_a_worker_answers_and_what_it_fails_in_is_told(worker: Worker) -> None:
    with worker:
        assert worker.ask("square", n=7).value == {"n": 49}
        with pytest.raises(WorkerError, match="wrong input"):
            worker.ask("fail")
        assert worker.ask("square", n=2).value == {"n": 4}
        with pytest.raises(WorkerError, match="ended during 'die'"):
            worker.ask("die")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_the_memory_of_a_worker_is_watched(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, memory = tmp_path / "seen", harness.memory

    def noting(pid: int | str = "self") -> dict[str, int]:
        found = memory(pid)
        if found.get("anonymous", 0) >= 64 * 2**20:
            seen.touch()
        return found

    monkeypatch.setattr(harness, "memory", noting)
    with worker:
        grown = worker.ask("grow", timeout=120, mib=64, seen=str(seen))
    assert grown.value == {"n": 64 * 2**20} and 64 * 2**20 <= grown.anonymous_peak < 2**30


def test_a_worker_that_overruns_is_ended(worker: Worker) -> None:
    with worker:
        with pytest.raises(WorkerError, match="overran"):
            worker.ask("wait", timeout=0.3)
        assert worker._process.returncode == -signal.SIGKILL


def test_raw_files_are_dated_never_overwritten_and_hold_no_place(tmp_path: Path) -> None:
    data = {"kind": "x", "rows": [{"error": f"no file {harness.ROOT}/a.py on {socket.gethostname()}"}], "machine": {}}
    first, second = (harness.save("toy", data, tmp_path) for _ in range(2))
    assert first != second and first.name.endswith("-toy.json")
    text = first.read_text()
    assert str(harness.ROOT) not in text and "<root>/a.py" in text
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in text
    assert json.loads(text)["when"].endswith("Z")
    profile = harness.save("toy", {"text": "aten::mm"}, tmp_path, suffix=".profile.txt")
    assert profile.read_text() == "aten::mm"


def test_the_machine_is_described_without_naming_it() -> None:
    found = harness.machine()
    assert found["cores"] >= 1 and found["versions"]["torch"]
    words = json.dumps(found)
    assert str(Path.home()) not in words and str(harness.ROOT) not in words
