"""Runner: launches the steps of a run, reads their numbers without holding up the device, and pauses to evaluate."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitune.config import Training
from minitune.data.batch import Batch
from minitune.errors import InputError, out_of_memory
from minitune.training.checkpoint import Checkpoints, Position
from minitune.training.hints import NO_GRADIENT, Divergence
from minitune.training.interrupt import unbroken
from minitune.training.left_out import NO_UPDATE_YET, LeftOut, numbers
from minitune.training.machine import Company, peak_memory
from minitune.training.optimizers import FlatOptimizer
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord, tell
from minitune.training.schedule import learning_rate, warmup_of
from minitune.training.shortage import Shortage, free_what_hangs_on
from minitune.training.spikes import NONE, Limits, Window, is_number
from minitune.training.step import Objective, gradients, update

Evaluate = Callable[[int, Callable[[float | None], bool]], EvaluationRecord | None]
"""(steps done, whether it is before the first or after the last of them, by the validation loss) -> what was found, or
None: nothing to do."""
EVALUATIONS = 10
"""About so many in a run whose settings do not say."""


class TrainingDiverged(RuntimeError):
    """The trained weights are no longer finite numbers, step after step was left out, or a spike is to end the run; the
    message names the step and what to do. ``resumable``: nothing is spoilt, and the run's state is kept."""

    def __init__(self, message: str, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


@dataclass(frozen=True)
class StepRows:
    """The rows of one step as they came, and as micro-batches on the device; how many positions the rows have, how many
    of these are filler (which a CPU leaves out), and their FLOPs."""

    rows: list[Batch]
    batches: list[Batch]
    n_tokens: int
    n_filler: int
    flops: float


class Runner:
    """Does the steps of `run`, from `position` on. On a GPU the numbers of a step are read while the next one runs.

    `checkpoints` are written every ``save_every`` steps and by `broken_off`. ``position`` is where weights, moments
    and generators stand, wherever an exception comes from; but for one within an update (then the state is ``torn``),
    which Ctrl-C does not break.
    """

    def __init__(self, model: Any, optimizer: FlatOptimizer, objective: Objective, observers: Sequence[Observer],
                 run: Run, evaluate: Evaluate | None, divergence: Divergence, left_out: LeftOut, shortage: Shortage,
                 position: Position, checkpoints: Checkpoints | None) -> None:
        self.model, self.optimizer, self.objective, self.observers = model, optimizer, objective, observers
        self.run, self.evaluate, self.divergence, self.left_out = run, evaluate, divergence, left_out
        self.shortage = shortage
        self.position, self.checkpoints, self.torn = position, checkpoints, False
        self._evaluations_kept = len(run.evaluations)
        self.device = torch.device(run.info.device)
        self.lag = 0 if self.device.type == "cpu" else 1
        self.skips = run.info.training.spikes != "warn"
        self.waiting: deque[_Launched] = deque()
        self.window, self.company = Window(), Company(self.device)
        for record in run.records:      # of a run that goes on
            self._watch(record)
        left_out.resume(run.records)

    def go(self, groups: Iterator[StepRows]) -> None:
        """A step for each group. Raises TrainingDiverged."""
        info = self.run.info
        every = info.training.evaluate_every or math.ceil(info.total_steps / EVALUATIONS)
        if not self.position.step:
            self._pause(0, True)
        self.position = self.position.standing(self.device)
        self.before = _Mark(self.device)
        for group in groups:
            done = self.position.step
            if self.evaluate is not None and done and done % every == 0:
                self._drain()
                self._pause(done, False)
                if self.is_enough():
                    break
                self.before = _Mark(self.device)
            if self.checkpoints is not None and self._is_due(done, self.checkpoints):
                self._drain()
                self._save(self.checkpoints)
                self.before = _Mark(self.device)
            self._launch(group)
            while len(self.waiting) > self.lag:
                self._settle()
        self._drain()
        last = self.run.records[-1:]
        if last and not is_told(last[0], info):
            tell(self.observers, "on_step", last[0])  # the data ended before the planned last step
        if last:
            self._pause(last[0].step, True)

    def _launch(self, group: StepRows) -> None:
        """The work of one step, queued; with it ``position`` moves on, all or nothing."""
        info = self.run.info
        done = self.position.step
        lr = learning_rate(done, info.total_steps, info.training)
        highest = self.window.limits(self.run.records, done - self.lag)
        loss, n_trained = self._gradients(group)
        with unbroken():
            self.torn = True
            norm = update(self.optimizer, lr, info.training.clip, loss, highest if self.skips else NONE)
            self.position = self.position.after(len(group.rows), self.device)
            self.waiting.append(_Launched(done + 1, lr, loss, norm, n_trained, group, highest, self.device))
            self.torn = False

    def _gradients(self, group: StepRows) -> tuple[Tensor, int]:
        """Those of a step -> (loss, trained tokens). Where memory runs out it is begun again with less, if it can."""
        batches, handled = group.batches, sys.exception()
        while True:
            try:
                return gradients(self.model, batches, self.optimizer, self.objective)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error) is None:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                free_what_hangs_on(error, self.device, handled)
                told = self.shortage.met(batches)
                if told is None:
                    error.add_note(f"step {self.position.step + 1}: memory ran out with {self.shortage.least(batches)}")
                    raise
            tell(self.observers, "on_note", f"step {self.position.step + 1}: {told}")
            batches = self.shortage.micro_batches(group.rows, self.device)
            self.position.set_generators(self.device)

    def broken_off(self, error: BaseException) -> None:
        """What is left to do where `error` ends the run: a checkpoint of the last whole step; but after a divergence,
        and within an update, the weights of the last checkpoint, if there is one, take the place of spoilt ones."""
        if isinstance(error, TrainingDiverged):
            self.run.end = "diverged"
        else:
            self.run.end = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if isinstance(error, TrainingDiverged) and not error.resumable:
            if self.checkpoints is not None and self.checkpoints.step is not None and not self._is_sound():
                self._fall_back(error, self.checkpoints)
            return
        kept = None if self.checkpoints is None else self.checkpoints.step
        if self.torn and self.position.step:
            error.add_note(f"Step {self.position.step + 1} broke off within its update: what was trained has a part of "
                           f"it{'' if kept is None else f', and the weights of step {kept} take its place'}.")
        if self.checkpoints is None:
            return
        if self.position.step and not self.torn:
            while self.waiting:
                record, launched = self._take()
                self.left_out.count(record)
                if record.left_out:      # told here: who goes on does not read it again
                    spike = launched.highest.told(record.loss, record.grad_norm)
                    error.add_note(f"{self.left_out.told(record, launched.pieces, spike)}.")
            self._save(self.checkpoints)
        elif self.torn and kept is not None:
            self._fall_back(error, self.checkpoints)
        self.run.checkpoint = self.checkpoints.step
        if self.run.checkpoint is not None:
            error.add_note(f"The run is kept as it was after step {self.run.checkpoint}; resume goes on from there.")

    def _fall_back(self, error: BaseException, checkpoints: Checkpoints) -> None:
        """Put the last checkpoint's weights in the place of spoilt ones; what is damaged of it goes into the error."""
        try:
            self.run.restored = checkpoints.restore_weights(self.model, self.optimizer)
        except InputError as fault:
            error.add_note(f"But no checkpoint can be read, so nothing is saved: {fault}")
        else:
            if self.run.restored != checkpoints.step:
                error.add_note(f"But the checkpoint after step {checkpoints.step} is damaged: what is saved is from "
                               f"the one before it, after step {self.run.restored}.")

    def _is_due(self, step: int, checkpoints: Checkpoints) -> bool:
        """Whether ``save_every`` asks for a checkpoint after this step, and there is none of it yet. Where the last
        steps were no numbers, the weights may be what is wrong, and those of before are kept."""
        every = self.run.info.training.save_every
        return (every is not None and step > 0 and step % every == 0 and step != checkpoints.step
                and self._only_spikes())

    def _only_spikes(self) -> bool:
        """Whether the steps that were left out last, if any, were numbers."""
        return all(map(is_number, self.run.records[len(self.run.records) - self.left_out.in_a_row:]))

    def _save(self, checkpoints: Checkpoints) -> None:
        """A checkpoint of ``position``, whose steps are all settled; none of spoilt weights. One that cannot be written
        is told of, and ends no run. None where there is one of all that was done."""
        kept = (checkpoints.step, self._evaluations_kept) == (self.position.step, len(self.run.evaluations))
        if kept or not self._is_sound():
            return
        try:
            checkpoints.write(self.position, self.model, self.optimizer, self.run)
            self._evaluations_kept = len(self.run.evaluations)
        except InputError as error:
            stays = f"that of step {checkpoints.step} stays" if checkpoints.step else "there is none"
            tell(self.observers, "on_note", f"step {self.position.step}: no checkpoint: {error}; {stays}")

    def _pause(self, step: int, end: bool) -> None:
        """Evaluate, and tell of it, unless a run that goes on did so before. The model is in eval mode meanwhile."""
        if self.evaluate is None or any(each.step == step for each in self.run.evaluations[-1:]):
            return
        self.model.train(False)
        record = self.evaluate(step, lambda loss: end or self.is_enough(loss))
        self.model.train(True)
        if record is not None:
            tell(self.observers, "on_evaluation", record)
            self.run.evaluations.append(record)     # from here on a run that goes on does it no more

    def is_enough(self, *loss: float | None) -> bool:
        """Whether the last ``patience`` evaluations, the one that found this `loss` among them, found no lower one."""
        patience = self.run.info.training.patience
        seen = [each.loss for each in self.run.evaluations if each.step] + list(loss)
        losses = [math.inf if value is None or math.isnan(value) else value for value in seen]
        return patience is not None and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])

    def _drain(self) -> None:
        while self.waiting:
            self._settle()

    def _settle(self) -> None:
        """Take the oldest step's record and tell the observers."""
        record, launched = self._take()
        if is_told(record, self.run.info):
            tell(self.observers, "on_step", record)
        spike = launched.highest.told(record.loss, record.grad_norm)
        self.left_out.count(record)
        if record.left_out:
            self._leave_out(record, launched.pieces, spike)
        elif spike:
            tell(self.observers, "on_note", self.left_out.told(record, launched.pieces, spike))
        if record.step == 1 and record.grad_norm == 0:
            tell(self.observers, "on_note", NO_GRADIENT)
        if self._watch(record):
            tell(self.observers, "on_note",
                 f"step {record.step}: diverging: the median loss of the last {self.divergence.steps} steps is "
                 f"{self.divergence.median:.2f}, the first one was {self.divergence.first:.2f}; begin anew, "
                 f"{_gentler(self.run.info.training)}")
        if told := self.company.told():
            tell(self.observers, "on_note", f"step {record.step}: {told}")

    def _take(self) -> tuple[StepRecord, _Launched]:
        """Read the oldest step's numbers, and record it: a step that was done is never without its record."""
        with unbroken():
            launched = self.waiting.popleft()
            launched.mark.wait()
            loss, norm = launched.values.tolist()
            spike = self.skips and launched.highest.told(loss, norm)
            record = StepRecord(step=launched.step, loss=loss, lr=launched.lr, grad_norm=norm,
                                n_trained=launched.n_trained, n_tokens=launched.group.n_tokens,
                                seconds=launched.mark.since(self.before), n_filler=launched.group.n_filler,
                                flops=launched.group.flops, memory=peak_memory(self.device),
                                left_out=bool(spike) or not (math.isfinite(loss) and math.isfinite(norm)))
            self.before = launched.mark
            self.run.records.append(record)
        return record, launched

    def _leave_out(self, record: StepRecord, pieces: Sequence[int], spike: str) -> None:
        """Tell of a step that was not taken. TrainingDiverged where no other one is to be."""
        trained = any(not before.left_out for before in self.run.records)
        if not self._is_sound():
            advice = self._advice() if trained else f" and are not saved. {NO_UPDATE_YET}"
            raise TrainingDiverged(f"{numbers(record)}. The trained weights are spoilt{advice}")
        told = self.left_out.told(record, pieces, spike)
        if spike and self.run.info.training.spikes == "stop":
            raise TrainingDiverged(f"{told}. It ends the run, as spikes is stop", resumable=True)
        if self.left_out.too_many and self._only_spikes():
            raise TrainingDiverged(f"{told}. What was trained before them is kept: look at these samples, and resume, "
                                   "with spikes=warn to train on such steps", resumable=True)
        if self.left_out.too_many:
            gentler = ("The weights before them are kept; begin anew, without these samples or with a higher "
                       f"max_skipped, if it is they, else {_gentler(self.run.info.training)}")
            raise TrainingDiverged(f"{told}. {gentler if trained else NO_UPDATE_YET}")
        tell(self.observers, "on_note", told)

    def _watch(self, record: StepRecord) -> bool:
        """Whether this step's loss shows that the run diverges."""
        if record.left_out or not self.divergence.seen(record.loss):
            return False
        self.run.diverging = record.step
        return True

    def check_weights(self) -> None:
        """TrainingDiverged if the last update, which no later loss has seen, spoilt the trained weights."""
        if not self._is_sound():
            raise TrainingDiverged(f"step {len(self.run.records)}: its update made weights that are not finite"
                                   f"{self._advice()}")

    def _is_sound(self) -> bool:
        """Whether all trained weights are finite."""
        return all_finite(p for group in self.optimizer.param_groups for p in group["params"])

    def _advice(self) -> str:
        """What becomes of weights that are spoilt, and what to do."""
        gentler = _gentler(self.run.info.training)
        if self.checkpoints is None or self.checkpoints.step is None:
            return f" and are not saved: begin anew, {gentler}"
        return (f"; those of the checkpoint after step {self.checkpoints.step} take their place and are saved in "
                f"{self.checkpoints.trained}: go on from there in a new run, {gentler}")


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

    def __init__(self, step: int, lr: float, loss: Tensor, norm: Tensor, n_trained: int, group: StepRows,
                 highest: Limits, device: torch.device) -> None:
        self.step, self.lr, self.n_trained, self.highest = step, lr, n_trained, highest
        self.group = replace(group, rows=[], batches=[])        # which need not stay in memory
        self.pieces = list(dict.fromkeys(piece for row in group.rows for piece in row.pieces))     # a pair has two
        values = torch.stack([loss.float(), norm.to(loss.device)])
        # Into pinned memory, and never read before the mark has passed: `.item()` would wait for the next step, too.
        self.values: Tensor = values.to("cpu", non_blocking=True)
        self.mark = _Mark(device)


def _gentler(training: Training) -> str:
    clip = "1" if training.clip == 0 or training.clip > 1 else f"{training.clip / 10:g}"
    return (f"with a lower lr (it is {training.lr:g}), a longer warmup (it is {warmup_of(training):g}) or a clip of "
            f"{clip} (it is {training.clip:g}{', which does not clip' if training.clip == 0 else ''})")


def all_finite(weights: Iterable[Tensor]) -> bool:
    """Whether no value of these weights, which lie on one device, is NaN or infinite."""
    return bool(torch.stack([weight.detach().isfinite().all() for weight in weights]).all())


def is_told(record: StepRecord, info: RunInfo) -> bool:
    """Whether observers hear of this step."""
    return record.step in (1, info.total_steps) or record.step % info.training.log_every == 0 or record.left_out
