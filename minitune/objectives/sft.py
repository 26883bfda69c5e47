"""sft: supervised fine-tuning, the weighted negative log-likelihood of the trained tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from minitune.data.batch import Batch


class LanguageModel(Protocol):
    """What this objective asks of a model."""

    def hidden(self, batch: Batch) -> Tensor:
        """[T, d_model], after the final norm."""

    def losses_at(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels [n] -> negative log-likelihood fp32 [n]."""


def sft(model: LanguageModel, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """(sum over trained tokens of weight · loss, fp32 scalar; how many tokens are trained). The head sees the trained
    positions alone.

    The caller divides by the trained tokens of the whole optimizer step, so any split into micro-batches gives the
    same gradient.
    """
    losses = model.losses_at(model.hidden(batch)[batch.trained], batch.labels[batch.trained], label_smoothing)
    if batch.weights is not None:
        losses = losses * batch.weights[batch.trained]
    return torch.sum(losses), batch.n_trained
