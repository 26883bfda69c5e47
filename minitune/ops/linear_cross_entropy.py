"""linear_cross_entropy: the loss of each trained token straight from its hidden state; logits [T, V] never exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minitune.ops.chunks import in_cache

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Room for the fp32 logits of one chunk of tokens: at a vocabulary of 32,000 that is 524 tokens on a CPU, 4,194 on a
GPU, which wants tall products."""


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden [n, d], head weight [V, d], labels int64 [n] -> negative log-likelihood fp32 [n]."""
    return F.cross_entropy((hidden @ weight.mT).to(_wide(hidden)), labels, reduction="none")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunk(weight: Tensor) -> int:
    return max(16, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight)))


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [n], log-probabilities [n, V]), both fp32, from logits [n, V]."""
    log_p = torch.log_softmax(logits, -1, dtype=_wide(logits))
    return -log_p.gather(1, labels[:, None])[:, 0], log_p


class _FrozenHead(torch.autograd.Function):
    """The gradient is formed in the forward pass, while a chunk's logits are at hand (Hsu et al. 2024, Liger Kernel).

    Token t's loss depends on hidden state t alone, so d loss_t / d hidden_t, kept as [n, d], serves any weighting of
    the tokens: the backward multiplies it by what arrives.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(len(labels), dtype=_wide(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = _chunk(weight)
        logits = hidden.new_empty(min(size, len(labels)), len(weight))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            part = torch.mm(hidden[rows], weight.mT, out=logits[: len(labels[rows])])
            for some in in_cache(len(part), part.shape[1], part.device):
                losses[rows][some], log_p = _losses(part[some], labels[rows][some])
                if gradient is not None:
                    minus_one = log_p.new_full((len(log_p), 1), -1)     # in fp32: 1 - p may be far smaller than p
                    part[some] = log_p.exp_().scatter_add_(1, labels[rows][some, None], minus_one)
            if gradient is not None:
                torch.mm(part, weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None


def _trained_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return reference(hidden, weight.to(hidden.dtype), labels)      # cast in here, so that no chunk keeps a copy


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden [n, d], head weight [V, d], labels int64 [n] without ignored ones -> negative log-likelihood fp32 [n].

    A frozen head gets no gradient and costs none. A trained one takes the reference chunk by chunk, its logits
    computed again in the backward.
    """
    if not (weight.requires_grad and torch.is_grad_enabled()):
        losses: Tensor = _FrozenHead.apply(hidden, weight.detach().to(hidden.dtype), labels)
        return losses
    parts = [checkpoint(_trained_head, h, weight, y, use_reentrant=False)
             for h, y in zip(hidden.split(_chunk(weight)), labels.split(_chunk(weight)), strict=True)]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=_wide(hidden))
