"""train_step: one optimizer step over any split into micro-batches, normalised by all its trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.training.optimizers import FlatOptimizer, clip_grad_norm

Objective = Callable[[Any, Batch], tuple[Tensor, int]]
"""(model, batch) -> (the sum of the losses of the batch's trained tokens: fp32, 0-dim, with a graph; their number)."""


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the step's trained tokens; ``grad_norm``: global norm before clipping.

    Both are fp32 0-dim tensors, still on the device.
    """

    loss: Tensor
    grad_norm: Tensor
    n_trained: int
    n_tokens: int


def own_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The objective of an `mt.Model` that names no other: weight · loss of the next token, `model.loss_sum`."""
    total, n = model.loss_sum(batch)
    return total, n


def train_step(model: Any, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer, lr: float | None = None,
               clip: float = 1.0, objective: Objective = own_loss) -> StepResult:
    """Gradients of all micro-batches, clipped to the global norm `clip` (0: not clipped), then one update.

    The number of trained tokens of the whole step is known on the host before it begins and divides every loss, so any
    split gives the same gradient. Nothing here asks the device. A group's learning rate becomes `lr` times its
    ``lr_ratio``, where it has one; without `lr` the groups keep theirs. Works with any torch optimizer; with minitune's
    the update is one launch for all small parameters of a group.

    Raises InputError where no token of the step is trained.
    """
    if isinstance(micro_batches, Batch):
        micro_batches = [micro_batches]
    loss, n_step = gradients(model, micro_batches, optimizer, objective)
    norm = update(optimizer, lr, clip)
    return StepResult(loss, norm, n_step, sum(batch.n_tokens for batch in micro_batches))


def gradients(model: Any, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer,
              objective: Objective) -> tuple[Tensor, int]:
    """The first half of `train_step` -> (loss, trained tokens). It changes gradients alone, no weight and no moment."""
    n_step = sum(batch.n_trained for batch in micro_batches)
    if n_step == 0:
        raise InputError(f"train_step: none of the {sum(b.n_tokens for b in micro_batches)} tokens of this step is "
                         "trained (all labels are -100); check the data, or use longer micro-batches or more of them")
    optimizer.zero_grad(set_to_none=True)
    total: Tensor | None = None
    for batch in micro_batches:
        if batch.n_trained == 0:
            continue
        loss_sum, n = objective(model, batch)
        if n != batch.n_trained:
            raise ValueError(f"the objective counted {n} trained tokens where the batch has {batch.n_trained}")
        (loss_sum / n_step).backward()
        total = loss_sum.detach() if total is None else total + loss_sum.detach()
        del loss_sum    # and with it the graph, before the next forward
    assert total is not None
    return total / n_step, n_step


def update(optimizer: torch.optim.Optimizer, lr: float | None, clip: float) -> Tensor:
    """The second half: clips the gradients and takes the step -> their global norm before."""
    norm = clip_grad_norm(optimizer, clip)
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.step()
    if isinstance(optimizer, FlatOptimizer):
        optimizer.release_gradients()       # what comes before the next backward has their memory
    return norm
