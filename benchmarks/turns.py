"""Trainers side by side: each a process of its own, a few steps at a time by turns, while the others sleep.

A turn in which other processes took more than a share of the CPU is void and repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from typing import Any

from benchmarks.harness import Answer, Worker, WorkerError, ask_quietly, summary

MUST_FALL = 0.02
"""Nats that the loss of the one repeated batch must fall by in the whole run; less is standing still."""

SETTINGS = {"freed_memory": "kept", "rivals_peaks": "freed memory given back"}
"""Of a raw file: all are timed alike, and a rival's peak of memory is that of a process as its users run it."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Record:
    """The turns of one side: valid samples, void turns, the whole loss curve, the peak of memory."""

    def __init__(self, name: str, n_tokens: int) -> None:
        self.name, self.n_tokens = name, n_tokens
        self.turns: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.memory: dict[str, int] = {}
        self.extra: dict[str, Any] = {}

    def add(self, answers: list[Answer], limit: float, warmup: bool = False) -> None:
        for answer in answers:
            value = answer.value
            self.losses += value.get("losses", [])
            if "grad_norm" in value:
                self.grad_norms.append(value["grad_norm"])
            self.memory = {**value["memory"], "anonymous_peak": max(self.memory.get("anonymous_peak", 0),
                                                                    answer.anonymous_peak)}
            self.extra = {key: value[key] for key in ("threads", "flops") if key in value}
            self.turns.append({"seconds": value["seconds"], "other_share": answer.other_share,
                               "void": answer.void(limit), "warmup": warmup})

    def rates(self) -> list[float]:
        """Tokens/s of every step of every valid turn."""
        return [self.n_tokens / second for turn in self.turns if not (turn["void"] or turn["warmup"])
                for second in turn["seconds"]]

    def still(self) -> bool:
        """Whether a trainer's loss stood still, or nothing had a gradient."""
        if not self.losses:
            return False
        return self.losses[0] - min(self.losses[-3:]) < MUST_FALL or min(self.grad_norms) <= 0

    def as_dict(self) -> dict[str, Any]:
        still = self.still()
        return {"name": self.name, "tokens_per_s": summary(self.rates()), "turns": self.turns, "losses": self.losses,
                "grad_norms": self.grad_norms, "void": still or not self.rates(), "loss_stood_still": still,
                "memory": self.memory, **self.extra}


def take_turns(sides: Mapping[str, list[str]], n_tokens: int, told: argparse.Namespace,
               profiled: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """All sides by turns, `told.rounds` times, steps of `n_tokens`; `sides`: name -> module and arguments of a Worker.

    A rival's peak of memory is measured behind them, in a process of its own (SETTINGS); where that fails, the one of
    its turns stays, with "peak_failed": why. Gives each side's record, or {"failed": why} of one whose first steps did
    not run, and a profile of those that are `profiled`.
    """
    records = {name: Record(name, n_tokens) for name in sides}
    failed: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    try:
        for name, words in sides.items():
            workers[name] = Worker(*words)
            try:
                records[name].add([workers[name].ask("steps", n=told.warmup)], told.void_share, warmup=True)
            except WorkerError as error:
                failed[name] = {"failed": str(error)[-500:]}
                workers.pop(name).close()
        for turn in range(told.rounds):
            for name, worker in workers.items():
                answers = ask_quietly(worker, "steps", told.attempts, told.void_share, n=told.steps)
                records[name].add(answers, told.void_share)
            medians = {name: summary(records[name].rates()).get("median") for name in workers}
            say(f"  round {turn + 1}: " + ", ".join(f"{name} {rate or 0:.0f}" for name, rate in medians.items()))
        profiles = {name: workers[name].ask("profile").value["text"] for name in profiled if name in workers}
    finally:
        for worker in workers.values():
            worker.close()
    found = {name: records[name].as_dict() for name in workers}
    for name in found:
        if name != "products" and not name.startswith("ours"):
            try:
                found[name] |= {"memory_kept": found[name]["memory"], "memory": _peak_as_it_comes(sides[name])}
            except WorkerError as error:        # the rounds before it are worth keeping
                say(f"  {name}: its peak in a process as it comes was not measured")
                found[name]["peak_failed"] = str(error)[-500:]
    return failed | found, profiles


def _peak_as_it_comes(words: list[str]) -> dict[str, int]:
    """The memory of a few steps of a rival whose malloc gives freed memory back, as it does unless told otherwise."""
    with Worker(*words) as worker:
        answer = worker.ask("steps", n=3, keep=False)
    return {**answer.value["memory"], "anonymous_peak": answer.anonymous_peak}


def all_ran(found: dict[str, Any]) -> dict[str, Any]:
    """`found`, where every side ran. Raises WorkerError."""
    failed = {name: side["failed"] for name, side in found.items() if "failed" in side}
    if failed:
        raise WorkerError(f"did not run: {failed}")
    return found


def compare_losses(sides: dict[str, Any]) -> dict[str, Any]:
    """Whether our loss curve is the rival's: the same start, and the same course though A starts from other noise."""
    if "ours" not in sides:
        return {"compared": False}
    ours, theirs = sides["ours"]["losses"], sides["eager"]["losses"]
    steps = min(len(ours), len(theirs))
    fell = theirs[0] - theirs[steps - 1]
    apart = max(abs(a - b) for a, b in zip(ours[:steps], theirs[:steps], strict=True))
    return {"compared": True, "start_difference": abs(ours[0] - theirs[0]), "largest_difference": apart, "steps": steps,
            "their_fall": fell, "our_fall": ours[0] - ours[steps - 1],
            "same_start": abs(ours[0] - theirs[0]) <= 2e-3 * theirs[0], "same_course": apart <= max(0.02, 0.25 * fell)}
