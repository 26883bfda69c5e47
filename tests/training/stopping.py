"""Runs of the fakes that are stopped, with dropout, data that knows its epochs, and evaluations."""

from __future__ import annotations

import shutil

from torch import nn

from minitune.training.checkpoint import Checkpoints
from minitune.training.loop import fit
from minitune.training.run import EvaluationRecord, Observer, SampleAnswer


def data(fakes, n=5):
    return [fakes.make_batch(12, 7 + i, seed=i) for i in range(n)]


def dropped(model, batch):
    """The fakes' objective behind dropout, which draws from torch's generator."""
    hidden = nn.functional.dropout(model.table[batch.tokens[batch.trained]], 0.3, model.training)
    logits = hidden @ model.A.T @ model.B.T
    return nn.functional.cross_entropy(logits, batch.labels[batch.trained], reduction="sum"), batch.n_trained


class Epochs:
    """Batches in another order in each epoch; ``made``: the epochs that were asked for."""

    def __init__(self, batches):
        self.batches, self.made = batches, []

    def count(self, epochs):
        return len(self.batches) * epochs

    def epoch(self, epoch):
        self.made.append(epoch)
        at = epoch % len(self.batches)
        return iter(self.batches[at:] + self.batches[:at])

    def __iter__(self):
        raise AssertionError("the epochs' own order is not used")


def seen(step, end):
    return EvaluationRecord(step=step, seconds=0.1, loss=1.0 + step, perplexity=float("inf"),
                            answers=(SampleAnswer(question="é?", answer="\n"),) if end else ())


class Stop(Observer):
    """Ends the run after a step; a copy of the checkpoint as it stands then is what a killed process leaves."""

    def __init__(self, after, error=KeyboardInterrupt, copy=None):
        self.after, self.error, self.copy, self.run = after, error, copy, None

    def on_step(self, record):
        if record.step == self.after:
            if self.copy is not None:
                shutil.copytree(self.copy, self.copy.with_name("copy"))
            raise self.error

    def on_end(self, run):
        self.run = run


def checkpoints(folder, step=None):
    return Checkpoints(folder / "checkpoint", lambda: {"purpose": "a test"}, folder / "adapter", step)


def train(fakes, model, batches, training, **how):
    return fit(model, batches, training, dropped, **how)
