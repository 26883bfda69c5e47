"""Clipping by the global norm, without asking the device: one pass over the gradients, accumulated in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BLOCK = 4096
"""Elements summed in fp32 before fp64 takes over: one fp32 sum over ten million elements is off by 3e-4."""


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements together: fp32, 0-dim, on the first tensor's device. Deterministic."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    device = tensors[0].device
    squares = torch.stack([_square_sum(t).to(device, non_blocking=True) for t in tensors])
    return squares.sum().sqrt().float()


def clip_scale(norm: Tensor, max_norm: float | None) -> Tensor:
    """What gradients of that norm are multiplied with: at most 1, as in ``torch.nn.utils.clip_grad_norm_``, and 1 with
    `max_norm` None or 0; but NaN where the norm is not finite, at which the steps of `mt.AdamW` and `mt.SGD` are not
    taken."""
    kept = torch.ones_like(norm) if not max_norm else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return kept + 0 * norm


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float | None, loss: Tensor | None = None) -> Tensor:
    """Scale the gradients of `params` in place so that their global norm is at most `max_norm`; the norm before it.

    With `max_norm` None or 0 only the norm is taken. Parameters without a gradient take no part. With a `loss` (0-dim)
    the gradients on a GPU become zero where it or the norm is not finite, since there nobody can be asked whether to
    take the step.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = global_norm(grads)
    guarded = loss is not None and not asks(norm.device)
    if max_norm or guarded:
        scale = clip_scale(sound(norm, loss), max_norm)
        for grad in grads:
            grad.mul_(scale.to(grad.device, non_blocking=True))
            if guarded:
                grad.nan_to_num_(0.0, 0.0, 0.0)
    return norm


def asks(device: torch.device) -> bool:
    """Whether the host may look at a number there: on a CPU, where it waits for nothing."""
    return device.type == "cpu"


def sound(norm: Tensor, loss: Tensor | None) -> Tensor:
    """The norm, but NaN where the loss (0-dim) is not finite; on the loss's device."""
    return norm if loss is None else norm.to(loss.device, non_blocking=True) + 0 * loss


def _square_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1), torch.linalg.vector_norm(flat[whole:])]
    return torch.cat([norms[0], norms[1][None]]).double().square().sum()
