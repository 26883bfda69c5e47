"""evaluate: loss, perplexity and token accuracy of a model on the trained tokens of batches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.arguments import answers_names, short
from minitune.data.batch import Batch
from minitune.data.stream import Stream
from minitune.errors import InputError
from minitune.ops.linear_cross_entropy import chunk_rows

GIVE = "give a list of batches, or mt.data.stream(file or samples, model.tokenizer, tokens=…)"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``loss`` is the mean negative log-likelihood (nats) of ``n_tokens`` tokens; ``accuracy`` the share of them that
    the model holds for the likeliest."""

    loss: float
    accuracy: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is more than a float holds."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


@answers_names
@torch.no_grad()
def evaluate(model: Any, batches: Iterable[Batch]) -> Evaluation:
    """The Evaluation of an `mt.Model` over the trained tokens of `batches`, every token counted alike: weights of
    samples and label smoothing belong to training and take no part. Of a stream one epoch is taken.

    The model is in eval mode meanwhile. The device is asked once, at the end. Logits exist for a chunk of positions at
    a time. InputError where no token is trained.
    """
    if not hasattr(model, "network"):
        raise InputError(f"evaluate: model is {short(model)}; give what mt.load returns, then the batches")
    if isinstance(batches, Stream) and batches.pairs:
        raise InputError("evaluate: batches are pairs of answers, the rejected ones among them; leave out pairs=True, "
                         "or see how often the chosen one is ahead: minitune.objectives.dpo.DPO(beta).evaluate")
    was_training = model.training
    model.eval()
    sums, n_tokens = torch.zeros(2, dtype=torch.float64, device=model.device), 0
    try:
        for batch in placed(model, batches):
            sums += _sums(model, batch)
            n_tokens += batch.n_trained
    finally:
        model.train(was_training)
    loss, correct = sums.tolist()
    return Evaluation(loss=loss / n_tokens, accuracy=correct / n_tokens, n_tokens=n_tokens)


def placed(model: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    """One epoch of `batches` as the model's device computes them, those in which something is trained. InputError for
    what is no batch, and where there is none of these."""
    if isinstance(batches, str | os.PathLike | Batch) or not isinstance(batches, Iterable):
        raise InputError(f"evaluate: batches is {short(batches)}; {GIVE}")
    n_trained = 0
    for batch in batches.epoch(0) if isinstance(batches, Stream) else batches:
        if not isinstance(batch, Batch):
            raise InputError(f"evaluate: batches holds {short(batch)}; {GIVE}")
        n_trained += batch.n_trained
        if batch.n_trained:
            yield batch.on(model.device)
    if not n_trained:
        raise InputError("evaluate: the data has no trained token (no batch, or all labels are -100)")


def _sums(model: Any, batch: Batch) -> Tensor:
    """fp64 [2]: the sum of the losses and the number of right tokens of one batch."""
    hidden, labels = model.hidden(batch)[batch.trained], batch.labels[batch.trained]
    size = chunk_rows(model.config.vocab_size, hidden.device)
    sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for rows, wanted in zip(hidden.split(size), labels.split(size), strict=True):
        logits = model.network.logits(rows)
        sums[0] += F.cross_entropy(logits, wanted, reduction="none").sum(dtype=torch.float64)
        sums[1] += (logits.argmax(-1) == wanted).sum()
    return sums
