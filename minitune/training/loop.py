"""fit: the training loop. It plans the steps, feeds them, and tells observers; it knows no screen and no file."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import count, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from minitune.config import Training
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.training.optimizers import SGD, AdamW, FlatOptimizer
from minitune.training.run import Observer, Run, RunInfo, StepRecord
from minitune.training.schedule import learning_rate
from minitune.training.step import Objective, StepResult, train_step


@runtime_checkable
class Epochs(Protocol):
    """Data that is shuffled and packed anew in every epoch, as `mt.data.stream` gives it."""

    def count(self, epochs: int) -> int:
        """Micro-batches in the first `epochs` epochs."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The micro-batches of one epoch, counted from 0."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient's norm is no longer a finite number; the message names the step and what to do."""


def fit(model: Any, batches: Iterable[Batch], training: Training, objective: Objective,
        observers: Sequence[Observer] = ()) -> Run:
    """Train what `model` gives as trainable: ``model.param_groups(lr)``, ``.device``, ``.train(mode)``, ``.training``.

    `batches` holds micro-batches and is read again for each epoch: a list, or a data set with a method ``epoch(i)``,
    which gives each its own order. An iterator ends the run when it ends. A step takes ``training.micro_batches`` of
    them, across the border of two epochs too; one that would have no trained token takes the next as well.
    ``max_steps``, where given, decides alone, and the data is repeated as often as needed; else the run has ``epochs``
    times the data.

    On a GPU the numbers of a step are read while the next one runs, so the device never waits for the host; observers
    hear of each step one step late, and a divergence is found one step late. Seeds torch's generators with
    ``training.seed``. The model's train/eval mode is put back at the end.

    Raises InputError for data or settings that can't make a run, TrainingDiverged for a non-finite loss or gradient.
    """
    total_steps, limit = _plan(batches, training)
    device = torch.device(model.device)
    torch.manual_seed(training.seed)
    optimizer = make_optimizer(model, training)
    n_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    run = Run(info=RunInfo(total_steps=total_steps, n_parameters=n_parameters, device=str(device), training=training))
    was_training = model.training
    model.train(True)
    try:
        _tell(observers, "on_start", run.info)
        groups = islice(_groups(batches, training.micro_batches, limit, device), total_steps)
        _steps(model, groups, optimizer, objective, observers, run)
        if not run.records:
            raise InputError("training: the data has no trained token (no batch, or all labels are -100)")
        run.end = "finished" if len(run.records) == total_steps else "out of data"
    except KeyboardInterrupt:
        run.end = "interrupted"
        raise
    finally:
        model.train(was_training)
        _tell(observers, "on_end", run)
    return run


def make_optimizer(model: Any, training: Training) -> FlatOptimizer:
    """The optimizer of `training` over ``model.param_groups(lr)``.

    A group keeps its own lr as a ratio to ``training.lr`` (LoRA+, arXiv:2402.12354), which the schedule then scales.
    """
    groups = [dict(group) for group in model.param_groups(training.lr)]
    for group in groups:
        group.setdefault("lr_ratio", group.get("lr", training.lr) / training.lr)
    if training.optimizer == "sgd":
        return SGD(groups, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return AdamW(groups, lr=training.lr, weight_decay=training.weight_decay, moments=training.moments)


def _plan(batches: Iterable[Batch], training: Training) -> tuple[int, int | None]:
    """(steps, micro-batches) of the run; with max_steps as many micro-batches as these take."""
    length = None
    if isinstance(batches, Epochs):
        length = batches.count(training.epochs)
    elif isinstance(batches, Sized):
        length = len(batches) * training.epochs
    if length == 0:
        raise InputError("training: there are no batches; the data holds nothing to train on")
    if training.max_steps is not None:
        return training.max_steps, None
    if length is None:
        raise InputError("training: the data has no length, so the number of steps is unknown; set max_steps, or "
                         "give a list of batches")
    return math.ceil(length / training.micro_batches), length


def _stream(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches again and again, each epoch in its own order if they know one; an iterator once only, and so too
    data in which nothing is trained."""
    for epoch in count():
        n_trained = 0
        drawn = batches.epoch(epoch) if isinstance(batches, Epochs) else iter(batches)
        for batch in drawn:
            n_trained += batch.n_trained
            yield batch
        if n_trained == 0 or drawn is batches:
            return


def _groups(batches: Iterable[Batch], size: int, limit: int | None,
            device: torch.device) -> Iterator[tuple[list[Batch], int]]:
    """The micro-batches of each step, on the device, and how much of them is filler. Drawn while the device is still
    busy with the step before."""
    group: list[Batch] = []
    n_filler = 0
    for batch in islice(_stream(batches), limit):
        n_filler += _filler(batch)
        group.append(_to(batch, device))
        if len(group) >= size and any(b.n_trained for b in group):
            yield group, n_filler
            group, n_filler = [], 0
    if any(b.n_trained for b in group):
        yield group, n_filler


def _filler(batch: Batch) -> int:
    """The length of the last document if nothing in it is trained: what packing left of the row. 0 for a batch that is
    on a device already, which is not asked."""
    if not batch.n_trained or batch.trained.device.type != "cpu":
        return 0
    last = batch.documents.lengths[-1]
    return last if int(batch.trained[-1]) < batch.n_tokens - last else 0


def _to(batch: Batch, device: torch.device) -> Batch:
    # A copy from pageable memory would wait for the work queued before it; a batch type that can pin itself does.
    pin = getattr(batch, "pin_memory", None) if device.type == "cuda" else None
    return (pin() if pin is not None else batch).to(device)


def _steps(model: Any, groups: Iterator[tuple[list[Batch], int]], optimizer: FlatOptimizer, objective: Objective,
           observers: Sequence[Observer], run: Run) -> None:
    training, total, device = run.info.training, run.info.total_steps, torch.device(run.info.device)
    lag = 0 if device.type == "cpu" else 1
    waiting: deque[_Launched] = deque()
    before = _Mark(device)
    for index, (group, n_filler) in enumerate(groups):
        lr = learning_rate(index, total, training)
        result = train_step(model, group, optimizer, lr, training.clip, objective)
        waiting.append(_Launched(index + 1, lr, result, n_filler, device))
        if len(waiting) > lag:
            before = _settle(waiting.popleft(), before, observers, run)
    while waiting:
        before = _settle(waiting.popleft(), before, observers, run)
    last = run.records[-1:]
    if last and not _is_told(last[0].step, run.info):
        _tell(observers, "on_step", last[0])  # the data ended before the planned last step


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

    def __init__(self, step: int, lr: float, result: StepResult, n_filler: int, device: torch.device) -> None:
        self.step, self.lr, self.result, self.n_filler = step, lr, result, n_filler
        values = torch.stack([result.loss.float(), result.grad_norm.to(result.loss.device)])
        # Into pinned memory, and never read before the mark has passed: `.item()` would wait for the next step, too.
        self.values: Tensor = values.to("cpu", non_blocking=True)
        self.mark = _Mark(device)


def _settle(launched: _Launched, before: _Mark, observers: Sequence[Observer], run: Run) -> _Mark:
    """Read a step's numbers, record it and tell the observers; returns the step's mark."""
    launched.mark.wait()
    loss, norm = launched.values.tolist()
    record = StepRecord(step=launched.step, loss=loss, lr=launched.lr, grad_norm=norm,
                        n_trained=launched.result.n_trained, n_tokens=launched.result.n_tokens,
                        seconds=launched.mark.since(before), n_filler=launched.n_filler)
    run.records.append(record)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if _is_told(record.step, run.info) or not finite:
        _tell(observers, "on_step", record)
    if not finite:
        raise TrainingDiverged(
            f"step {record.step}: loss {loss}, gradient norm {norm}, lr {record.lr:.3g}. The trained weights are "
            f"spoilt, and a run saves none on its way: begin it anew, {_gentler(run.info.training)}")
    return launched.mark


def _gentler(training: Training) -> str:
    clip = "1" if training.clip == 0 or training.clip > 1 else f"{training.clip / 10:g}"
    return (f"with a lower lr (it is {training.lr:g}), a longer warmup (it is {training.warmup:g}) or a clip of {clip} "
            f"(it is {training.clip:g}{', which does not clip' if training.clip == 0 else ''})")


def _is_told(step: int, info: RunInfo) -> bool:
    return step == 1 or step == info.total_steps or step % info.training.log_every == 0


def _tell(observers: Sequence[Observer], method: str, what: object) -> None:
    for observer in observers:
        listener = getattr(observer, method, None)
        if listener is not None:
            listener(what)
