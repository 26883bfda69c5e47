"""once: of a backward that is written by hand, and is no graph itself: who wants to differentiate it again is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from minitune.errors import InputError

Backward = Callable[..., Any]


def once(backward: Backward) -> Backward:
    """For ``autograd.Function.backward``: InputError under ``create_graph=True``, where autograd asks for a graph of
    the gradients. torch's `once_differentiable` raises only where the incoming gradient is part of a graph, which the 1
    that a loss starts from is not: a gradient penalty, or a product with the Hessian, would be silently wrong."""
    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise InputError("create_graph=True asks for second derivatives, which the hand-written backward does not "
                             "have; leave it out, or take the difference of the gradients at two points")
        return backward(ctx, *gradients)

    return checked
