"""fit: the training loop. It plans the steps, feeds them, and tells observers; it knows no screen and no file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import count, islice
from typing import Any, Protocol, runtime_checkable

import torch

from minitune.arguments import short
from minitune.config import Training
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.training.checkpoint import Checkpoints, Position, Saved
from minitune.training.flops import Costs
from minitune.training.hints import Divergence, hints
from minitune.training.interrupt import one_end, unbroken
from minitune.training.left_out import LeftOut
from minitune.training.optimizers import SGD, AdamW, FlatOptimizer
from minitune.training.run import Observer, Run, RunInfo, tell, tell_begin
from minitune.training.runner import Evaluate, Runner, StepRows, TrainingDiverged
from minitune.training.shortage import Shortage
from minitune.training.step import Objective

NOTHING = "training: the data has no trained token (no batch, or all labels are -100)"


@runtime_checkable
class Epochs(Protocol):
    """Data that is shuffled and packed anew in every epoch, as `mt.data.stream` gives it."""

    def count(self, epochs: int) -> int:
        """Micro-batches in the first `epochs` epochs."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The micro-batches of one epoch, counted from 0."""


def fit(model: Any, batches: Iterable[Batch], training: Training, objective: Objective,
        observers: Sequence[Observer] = (), *, evaluate: Evaluate | None = None, costs: Costs | None = None,
        matrix_rate: float | None = None, chance: float | None = None, checkpoints: Checkpoints | None = None,
        start: Saved | None = None, divisible: bool = False) -> Run:
    """Train what `model` gives as trainable: ``model.param_groups(lr)``, ``.device``, ``.train(mode)``, ``.training``.

    `batches` holds micro-batches and is read again for each epoch: a list, or a data set whose ``epoch(i)`` gives each
    its own order. An iterator ends the run when it ends. A step takes ``training.micro_batches`` of them, across the
    border of two epochs too; those in which nothing is trained are not counted. ``max_steps``, where given, decides
    alone, and the data is repeated as often as needed; else the run has ``epochs`` times the data. `evaluate` is called
    before the first step, every ``training.evaluate_every`` steps (a tenth of the run) and after the last one, with the
    model in eval mode; it must not draw from torch's generators, so that it changes nothing. `costs` counts each step's
    FLOPs; with `matrix_rate` observers can tell their share of it. With `chance`, the loss of guessing, ln(vocab_size),
    a loss that diverges is told of, as other `hints` are.

    `checkpoints` are written every ``training.save_every`` steps and when an exception ends the run, unless that is a
    divergence: then the last one's weights take the place of spoilt ones. `start`: one of them, which the run goes on
    from, on a CPU bit for bit; `batches` must be the same, and no iterator.

    Where memory runs out in a step, it is begun again with less kept for the backward, and if that is not enough, and
    the objective of a row is the sum of those of its documents (`divisible`), with fewer documents at a time.

    On a GPU the numbers of a step are read while the next one runs, so the device never waits for the host but at an
    evaluation; observers hear of each step, and of a divergence, one step late. Seeds torch's generators with
    ``training.seed``. The model's train/eval mode is put back at the end.

    A step whose loss or gradient is not finite changes nothing, and is told of. Raises InputError for data or settings
    that can't make a run, TrainingDiverged where more than ``training.max_skipped`` steps in a row are such, or the
    trained weights are not finite any more.
    """
    total_steps = planned(batches, training)
    device = torch.device(model.device)
    torch.manual_seed(training.seed)
    network = getattr(model, "network", None)
    notes = [*filter(None, [start and start.note]), *hints(batches, training, total_steps, device, network)]
    optimizer = make_optimizer(model, training)
    n_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    run = Run(info=RunInfo(total_steps=total_steps, n_parameters=n_parameters, device=str(device), training=training,
                           matrix_rate=matrix_rate))
    position = Position() if start is None else start.restore(model, optimizer, run)
    shortage = Shortage(network, divisible)
    left_out = LeftOut(training.max_skipped, getattr(batches, "where", "documents[{}]".format))
    runner = Runner(model, optimizer, objective, observers, run, evaluate, Divergence(chance), left_out, shortage,
                    position, checkpoints)
    with _ended(runner, model, observers):
        tell_begin(observers, run)
        if start is not None and checkpoints is not None:
            checkpoints.accept()        # last: whoever is killed before it asks for what was changed once more
        for note in notes:
            tell(observers, "on_note", note)
        drawn = _drawn(batches, position.micro_batches, None if training.max_steps else training.epochs)
        runner.go(islice(_groups(drawn, training.micro_batches, device, costs, shortage), total_steps - position.step))
        if not run.records:
            raise InputError(NOTHING)
        runner.check_weights()
        run.end = ("finished" if len(run.records) == total_steps else
                   "stopped early" if runner.is_enough() else "out of data")
    return run


@contextlib.contextmanager
def _ended(runner: Runner, model: Any, observers: Sequence[Observer]) -> Iterator[None]:
    """The model is in train mode within it. However it is left, the run ends in order: its state is kept where an error
    broke it off, and every observer hears of the end."""
    was_training = model.training
    with one_end():
        try:
            model.train(True)
            yield
        except BaseException as error:
            with unbroken():
                runner.broken_off(error)
            raise
        finally:
            # Every observer hears of it even if another one fails; and what they save is saved whole.
            with unbroken(), contextlib.ExitStack() as told:
                for observer in reversed(observers):
                    told.callback(tell, [observer], "on_end", runner.run)
                told.callback(model.train, was_training)


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


def planned(batches: Iterable[Batch], training: Training) -> int:
    """The steps of the run."""
    length = None
    if isinstance(batches, Epochs):
        length = batches.count(training.epochs)
    elif isinstance(batches, Sequence):
        length = sum(_trains(batch) for batch in batches) * training.epochs
    elif isinstance(batches, Sized):
        length = len(batches) * training.epochs
    if length == 0:
        raise InputError(NOTHING)
    if training.max_steps is not None:
        return training.max_steps
    if length is None:
        raise InputError("training: the data has no length, so the number of steps is unknown; set max_steps, or "
                         "give a list of batches")
    return math.ceil(length / training.micro_batches)


def _drawn(batches: Iterable[Batch], skip: int, epochs: int | None) -> Iterator[Batch]:
    """The batches that train something, but for the first `skip`. They come again and again, or for so many `epochs`,
    each in its own order if they know one; an iterator's once only, and so too those of data in which nothing is
    trained."""
    for epoch in count() if epochs is None else range(epochs):
        n_trained = 0
        if isinstance(batches, Epochs):
            size = batches.count(epoch + 1) - batches.count(epoch) if skip else 0
            if 0 < size <= skip:        # an epoch that is done need not be made
                skip -= size
                continue
            drawn = batches.epoch(epoch)
        else:
            drawn = iter(batches)
        for batch in drawn:
            if not isinstance(batch, Batch):
                raise InputError(f"training: the data gives {short(batch)}; it must give batches, as mt.data.stream "
                                 "and mt.data.pack make them, or be a list of samples (dicts)")
            if not _trains(batch):
                continue
            n_trained += batch.n_trained
            if skip:
                skip -= 1
            else:
                yield batch
        if n_trained == 0 or drawn is batches:
            return


def _trains(batch: Any) -> bool:
    """Whether something of a batch is trained: others count in no step. What is no Batch is told when it comes."""
    return not isinstance(batch, Batch) or batch.n_trained > 0


def _groups(batches: Iterable[Batch], size: int, device: torch.device, costs: Costs | None,
            shortage: Shortage) -> Iterator[StepRows]:
    """What each step takes. Drawn while the device is still busy with the step before."""
    source = iter(batches)
    while rows := list(islice(source, size)):
        flops = 0.0 if costs is None else sum(map(costs.of_batch, rows))
        yield StepRows(rows, shortage.micro_batches(rows, device), sum(row.n_tokens for row in rows),
                       sum(row.n_filler for row in rows), flops)


__all__ = ["Epochs", "TrainingDiverged", "fit", "make_optimizer"]
