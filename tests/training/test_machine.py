"""What a run measures of its machine: here, whether other processes take its cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitune.config import Training
from minitune.training import machine
from minitune.training.loop import fit
from minitune.training.run import Observer

CPU = torch.device("cpu")


class Clock:
    """Seconds that passed, and seconds of them without a core, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: int = 4) -> None:
        self.now, self.waited = 100.0, 5.0
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(machine, "_waited", lambda: self.waited)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def passes(self, seconds: float, waited: float) -> None:
        self.now += seconds
        self.waited += waited


def test_a_wait_for_cores_is_told_once_with_the_threads_to_take(monkeypatch):
    clock = Clock(monkeypatch)
    company = machine.Company(CPU)
    assert company.told() is None
    clock.passes(9, 9)          # too early to say
    assert company.told() is None
    clock.passes(1, 0)
    clock.waited -= 9 - 1       # of ten seconds one
    assert company.told() is None
    clock.passes(20, 5)         # of these alone: a quarter
    assert company.told() == (
        "for 25% of the last 20 seconds this process waited for a core, and where one of its 4 threads waits, all do: "
        "other processes compute here, or a container's share of the CPU is used up; end them, or take fewer threads "
        "(OMP_NUM_THREADS=3)")
    clock.passes(20, 20)
    assert company.told() is None


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cuda", 4)])
def test_nothing_is_told_of_one_thread_nor_of_a_gpu(monkeypatch, device, threads):
    clock = Clock(monkeypatch, threads)
    company = machine.Company(torch.device(device))
    clock.passes(30, 30)
    assert company.told() is None


def test_nothing_is_told_where_the_system_does_not_count_it(monkeypatch):
    clock = Clock(monkeypatch)
    company = machine.Company(CPU)
    clock.passes(30, 30)
    monkeypatch.setattr(machine, "_waited", lambda: None)
    assert company.told() is None


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="Linux alone counts it")
def test_the_time_waited_for_a_core_is_the_systems_count():
    """Two processes on one core wait for about as long as they run."""
    code = ("import os, sys, time; sys.path[:0] = sys.argv[1:]; from minitune.training.machine import _waited\n"
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); begun, before = time.monotonic(), _waited()\n"
            "print('up', flush=True); sys.stdin.readline(); begun, before = time.monotonic(), _waited()\n"
            "while time.monotonic() - begun < 1: pass\n"
            "print((_waited() - before) / (time.monotonic() - begun))")
    root = str(Path(machine.__file__).parents[2])
    both = [subprocess.Popen([sys.executable, "-c", code, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "up\n"
    shares = []
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        shares.append(float(process.communicate()[0]))
    assert max(shares) > 0.2, shares        # others on the machine may delay one of them


def test_a_run_tells_it_with_the_step_as_a_note(fakes, monkeypatch):
    class Notes(Observer):
        def __init__(self):
            self.heard = []

        def on_note(self, text):
            self.heard.append(text)

    notes = Notes()
    monkeypatch.setattr(machine, "LOOK", 0.0)
    waited = iter(range(1000))
    monkeypatch.setattr(machine, "_waited", lambda: float(next(waited)) * 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fit(fakes.TinyModel(), [fakes.make_batch(5, 6) for _ in range(3)], Training(tokens=16, max_steps=3),
        objective=fakes.objective, observers=[notes])
    (told,) = [each for each in notes.heard if "waited for a core" in each]
    assert told.startswith("step 1: for ") and "2 threads waits" in told and told.endswith("(OMP_NUM_THREADS=1)")
