"""Runner: launches the steps of a run, reads their numbers without holding up the device, and pauses to evaluate."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitune.config import Training
from minitune.data.batch import Batch
from minitune.training.hints import Divergence
from minitune.training.machine import peak_memory
from minitune.training.optimizers import FlatOptimizer
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord, tell
from minitune.training.schedule import learning_rate, warmup_of
from minitune.training.step import Objective, StepResult, train_step

Evaluate = Callable[[int, bool], EvaluationRecord | None]
"""(steps done, whether it is before the first or after the last of them) -> what was found, or None: nothing to do."""
EVALUATIONS = 10
"""About so many in a run whose settings do not say."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient's norm is no longer a finite number; the message names the step and what to do."""


@dataclass(frozen=True)
class Group:
    """The micro-batches of one step, on the device; how many positions their rows have, how many of these are filler
    (which a CPU leaves out), and their FLOPs."""

    batches: list[Batch]
    n_tokens: int
    n_filler: int
    flops: float


class Runner:
    """Does the steps of `run`. On a GPU the numbers of a step are read while the next one runs."""

    def __init__(self, model: Any, optimizer: FlatOptimizer, objective: Objective, observers: Sequence[Observer],
                 run: Run, evaluate: Evaluate | None, divergence: Divergence) -> None:
        self.model, self.optimizer, self.objective, self.observers = model, optimizer, objective, observers
        self.run, self.evaluate, self.divergence = run, evaluate, divergence
        self.device = torch.device(run.info.device)
        self.lag = 0 if self.device.type == "cpu" else 1
        self.waiting: deque[_Launched] = deque()

    def go(self, groups: Iterator[Group]) -> None:
        """A step for each group. Raises TrainingDiverged."""
        info = self.run.info
        every = info.training.evaluate_every or math.ceil(info.total_steps / EVALUATIONS)
        self._pause(0, True)
        self.before = _Mark(self.device)
        for index, group in enumerate(groups):
            if self.evaluate is not None and index and index % every == 0:
                self._drain()
                self._pause(index, False)
                self.before = _Mark(self.device)
            lr = learning_rate(index, info.total_steps, info.training)
            result = train_step(self.model, group.batches, self.optimizer, lr, info.training.clip, self.objective)
            self.waiting.append(_Launched(index + 1, lr, result, group, self.device))
            while len(self.waiting) > self.lag:
                self._settle()
        self._drain()
        last = self.run.records[-1:]
        if last and not _is_told(last[0].step, info):
            tell(self.observers, "on_step", last[0])  # the data ended before the planned last step
        if last:
            self._pause(last[0].step, True)

    def _pause(self, step: int, end: bool) -> None:
        """Evaluate, and tell of it. The model is in eval mode meanwhile."""
        if self.evaluate is None:
            return
        self.model.train(False)
        record = self.evaluate(step, end)
        self.model.train(True)
        if record is not None:
            self.run.evaluations.append(record)
            tell(self.observers, "on_evaluation", record)

    def _drain(self) -> None:
        while self.waiting:
            self._settle()

    def _settle(self) -> None:
        """Read the oldest step's numbers, record it and tell the observers."""
        launched = self.waiting.popleft()
        launched.mark.wait()
        loss, norm = launched.values.tolist()
        record = StepRecord(step=launched.step, loss=loss, lr=launched.lr, grad_norm=norm,
                            n_trained=launched.result.n_trained, n_tokens=launched.group.n_tokens,
                            seconds=launched.mark.since(self.before), n_filler=launched.group.n_filler,
                            flops=launched.group.flops, memory=peak_memory(self.device))
        self.before = launched.mark
        self.run.records.append(record)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if _is_told(record.step, self.run.info) or not finite:
            tell(self.observers, "on_step", record)
        if not finite:
            raise TrainingDiverged(
                f"step {record.step}: loss {loss}, gradient norm {norm}, lr {record.lr:.3g}. The trained weights are "
                f"spoilt and are not saved: begin anew, {_gentler(self.run.info.training)}")
        if self.divergence.seen(loss):
            self.run.diverging = record.step
            tell(self.observers, "on_note",
                 f"step {record.step}: diverging: the median loss of the last {self.divergence.steps} steps is "
                 f"{self.divergence.median:.2f}, the first one was {self.divergence.first:.2f}; begin anew, "
                 f"{_gentler(self.run.info.training)}")

    def check_weights(self) -> None:
        """TrainingDiverged if the last update, which no later loss has seen, spoilt the trained weights."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not bool(torch.stack([weight.detach().isfinite().all() for weight in weights]).all()):
            raise TrainingDiverged(f"step {len(self.run.records)}: its update made weights that are not finite, and "
                                   f"none are saved: begin anew, {_gentler(self.run.info.training)}")


class _Mark:
    """A point in time on the device: an event in its queue on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))
        self.time = time.perf_counter()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, other: _Mark) -> float:
        """Seconds; both points must have passed."""
        if self.event is not None and other.event is not None:
            return other.event.elapsed_time(self.event) / 1000
        return self.time - other.time


class _Launched:
    """A step whose work is queued: its numbers are on their way to the host, behind them a mark."""

    def __init__(self, step: int, lr: float, result: StepResult, group: Group, device: torch.device) -> None:
        self.step, self.lr, self.result = step, lr, result
        self.group = Group([], group.n_tokens, group.n_filler, group.flops)     # its batches need not stay in memory
        values = torch.stack([result.loss.float(), result.grad_norm.to(result.loss.device)])
        # Into pinned memory, and never read before the mark has passed: `.item()` would wait for the next step, too.
        self.values: Tensor = values.to("cpu", non_blocking=True)
        self.mark = _Mark(device)


def _gentler(training: Training) -> str:
    clip = "1" if training.clip == 0 or training.clip > 1 else f"{training.clip / 10:g}"
    return (f"with a lower lr (it is {training.lr:g}), a longer warmup (it is {warmup_of(training):g}) or a clip of "
            f"{clip} (it is {training.clip:g}{', which does not clip' if training.clip == 0 else ''})")


def _is_told(step: int, info: RunInfo) -> bool:
    return step == 1 or step == info.total_steps or step % info.training.log_every == 0
