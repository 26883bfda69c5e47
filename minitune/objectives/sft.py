"""sft: supervised fine-tuning, the weighted negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from minitune.data.batch import Batch
from minitune.errors import InputError


class LanguageModel(Protocol):
    """What this objective asks of a model."""

    @property
    def device(self) -> torch.device:
        """Where batches have to lie."""

    def hidden(self, batch: Batch) -> Tensor:
        """[T, d_model], after the final norm."""

    def losses_at(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels [n] -> negative log-likelihood fp32 [n]."""


def token_losses(model: LanguageModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """fp32 [n_trained]: the loss of each trained token. The head sees the trained positions alone."""
    return model.losses_at(model.hidden(batch)[batch.trained], batch.labels[batch.trained], label_smoothing)


def sft(model: LanguageModel, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """(sum over trained tokens of weight · loss, fp32 scalar; how many tokens are trained).

    The caller divides by the trained tokens of the whole optimizer step, so any split into micro-batches gives the
    same gradient.
    """
    losses = token_losses(model, batch, label_smoothing)
    if batch.weights is not None:
        losses = losses * batch.weights[batch.trained]
    return torch.sum(losses), batch.n_trained


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: Iterable[Batch]) -> float:
    """The mean of weight · loss over all trained tokens of the batches, without gradients. InputError if there is none.
    """
    sums = [sft(model, batch.to(model.device)) for batch in batches]
    if not sum(n for _, n in sums):
        raise InputError("the data trains no token, so its mean loss is not defined")
    return sum(float(total) for total, _ in sums) / sum(n for _, n in sums)
