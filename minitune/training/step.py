"""train_step: one optimizer step over any split into micro-batches, normalised by all its trained tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import check_at_least_zero, short
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.training.clip import asks
from minitune.training.optimizers import FlatOptimizer, check_max_norm, clip_grad_norm
from minitune.training.spikes import NONE, Limits

Objective = Callable[[Any, Batch], tuple[Tensor, int]]
"""(model, batch) -> (the sum of the batch's losses: fp32, 0-dim, with a graph; their number). A batch has as many
losses as trained tokens, or as the objective's own ``n_losses(batch)`` says, if it has that."""


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the step's losses, one a trained token if the objective does not count otherwise;
    ``grad_norm``: global norm before clipping.

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
               clip: float | None = 1.0, objective: Objective | None = None) -> StepResult:
    """Gradients of all micro-batches, clipped to the global norm `clip` (0: not clipped), then one update.

    The number of trained tokens of the whole step (or of what the objective counts, see `Objective`) is known on the
    host before it begins and divides every loss, so any split gives the same gradient. A step whose loss or gradient is
    not finite changes no weight; the result's numbers tell. A GPU is not asked in a step: there minitune's optimizers
    leave weights and moments as they are, though they count the step, and another's takes one of zero gradients, by its
    momentum and weight decay. A group's learning rate becomes `lr` times its ``lr_ratio``, where it has one; without
    `lr` the groups keep theirs, as a torch scheduler sets them. Works with any torch optimizer; with minitune's the
    update is one launch for all small parameters of a group.

    Raises InputError for what is no batch, rate or norm, and where no token of the step is trained.
    """
    micro_batches = checked("train_step", micro_batches, lr, clip)
    check_objective("train_step", objective)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"train_step: optimizer is {short(optimizer)}; give mt.AdamW, mt.SGD or one of torch's")
    loss, n_step = gradients(model, micro_batches, optimizer, own_loss if objective is None else objective)
    norm = update(optimizer, lr, clip, loss)
    return StepResult(loss, norm, n_step, sum(batch.n_tokens for batch in micro_batches))


def checked(owner: str, micro_batches: Any, lr: float | None, clip: float | None) -> list[Batch]:
    """The micro-batches as a list, one alone among them. InputError for arguments that can make no step."""
    found = [micro_batches] if isinstance(micro_batches, Batch) else micro_batches
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise InputError(f"{owner}: micro_batches is {short(micro_batches)}; give an mt.Batch, or a list of them")
    batches = list(found)
    if not batches:
        raise InputError(f"{owner}: micro_batches has no batch; give at least one (an iterator that was read to its "
                         "end gives no more)")
    odd = next((each for each in batches if not isinstance(each, Batch)), None)
    if odd is not None:
        raise InputError(f"{owner}: micro_batches holds {short(odd)}; give mt.Batch, as mt.data.pack makes them")
    if lr is not None:
        check_at_least_zero(owner, lr=lr)
    check_max_norm(clip)
    if not torch.is_grad_enabled():
        raise InputError(f"{owner}: gradients are switched off here (torch.no_grad); call it where they are on")
    return batches


def check_objective(owner: str, objective: Any) -> None:
    """InputError unless it is None, or can be called with a model and a batch."""
    wanted = "give a function of (model, batch) that gives (sum of losses, number of trained tokens)"
    if objective is None:
        return
    if not callable(objective):
        raise InputError(f"{owner}: objective is {short(objective)}; {wanted}")
    try:
        inspect.signature(objective).bind(None, None)
    except ValueError:
        return      # a function in C tells no signature
    except TypeError as error:
        raise InputError(f"{owner}: objective cannot be called with a model and a batch ({error}); {wanted}") from None


def gradients(model: Any, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer,
              objective: Objective) -> tuple[Tensor, int]:
    """The first half of `train_step` -> (loss, trained tokens). It changes gradients alone, no weight and no moment."""
    n_step = sum(batch.n_trained for batch in micro_batches)
    counts = [_n_losses(objective, batch) if batch.n_trained else 0 for batch in micro_batches]
    if n_step == 0:
        raise InputError(f"train_step: none of the {sum(b.n_tokens for b in micro_batches)} tokens of this step is "
                         "trained (all labels are -100); check the data, or use longer micro-batches or more of them")
    optimizer.zero_grad(set_to_none=True)
    total: Tensor | None = None
    for batch, count in zip(micro_batches, counts, strict=True):
        if batch.n_trained == 0:
            continue
        loss_sum, n = _result(objective(model, batch))
        if n != count:
            raise InputError(f"the objective counted {n} losses where the batch has {count}, by which the step divides "
                             "(its trained tokens, or what n_losses(batch) of the objective gives): of a mean of your "
                             "own give (mean * batch.n_trained, batch.n_trained)")
        (loss_sum / sum(counts)).backward()
        done = loss_sum.detach().float()        # an objective may count in another dtype
        total = done if total is None else total + done
        del loss_sum    # and with it the graph, before the next forward
    assert total is not None
    return total / sum(counts), n_step


def _n_losses(objective: Objective, batch: Batch) -> int:
    """How many losses a batch has, which is known before they are."""
    own = getattr(objective, "n_losses", None)
    return batch.n_trained if own is None else own(batch)


def _result(found: Any) -> tuple[Tensor, int]:
    """What an objective gave, if it is what it must be."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and type(found[1]) is int:
        loss, n = found
        if loss.dim() == 0 and loss.requires_grad:
            return loss, n
    raise InputError(f"the objective gave {short(found)}; it must give (the sum of the losses, a tensor of no dimension"
                     " that depends on what is trained, which lora= or train= of mt.load name; the number of trained "
                     "tokens, an int)")


def update(optimizer: torch.optim.Optimizer, lr: float | None, clip: float | None, loss: Tensor,
           limits: Limits = NONE) -> Tensor:
    """The second half: clips the gradients and takes the step -> their global norm before.

    A step whose `loss` or norm is not finite is left out, and with minitune's optimizers one above `limits`. A GPU is
    not asked: there minitune's optimizers leave weights and moments as they are, though they count the step, and
    another's takes a step of zero gradients.
    """
    norm = clip_grad_norm(optimizer, clip, loss)
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    if not asks(loss.device):
        if isinstance(optimizer, FlatOptimizer) and limits != NONE:
            optimizer.step_only_if(limits.hold(loss, norm))
        optimizer.step()
    elif (norm + loss).isfinite() & limits.hold(loss, norm):
        optimizer.step()
    if isinstance(optimizer, FlatOptimizer):
        optimizer.release_gradients()       # what comes before the next backward has their memory
    return norm
