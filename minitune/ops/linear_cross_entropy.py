"""linear_cross_entropy: the loss of each trained token straight from its hidden state; logits [T, V] never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitune.ops import backends
from minitune.ops.chunks import in_cache
from minitune.ops.once import once
from minitune.ops.versions import written

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Room for the fp32 logits of one chunk of tokens: at a vocabulary of 32,000 that is 524 tokens on a CPU, 4,194 on a
GPU, which wants tall products."""

VOCABULARY = 4096
"""Rows of the weight's gradient that are summed up at a time: the library's product is not in fp32, and lies beside."""

Head = Callable[[Tensor], Tensor]
"""hidden [n, d] -> logits [n, V], by plain autograd."""


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """hidden [n, d], head weight [V, d], labels int64 [n] -> negative log-likelihood fp32 [n].

    With label smoothing ε (Szegedy et al. 2016, arXiv:1512.00567) the target is 1 - ε on the label plus ε/V on all.
    """
    return F.cross_entropy((hidden @ weight.mT).to(_wide(hidden)), labels, reduction="none", label_smoothing=smoothing)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits there are at a time."""
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocab_size))


def losses_(logits: Tensor, labels: Tensor, losses: Tensor, smoothing: float, gradient: bool) -> None:
    """logits [n, V] and labels [n] -> losses fp32 [n]; with `gradient` each row of logits becomes the gradient of its
    loss, p - (1 - ε)·onehot - ε/V, formed in fp32: 1 - p may be far smaller than p."""
    if backends.choose("linear_cross_entropy", logits.device, dtype=logits.dtype) == "triton":
        from minitune.kernels import linear_cross_entropy as kernel

        kernel.losses_(logits, labels, losses, smoothing=smoothing, gradient=gradient)
        written(losses, logits if gradient else None)
        return
    if backends.by_rows("linear_cross_entropy", logits):
        torch.ops.minitune.rows_losses(logits, labels.contiguous(), losses, smoothing, gradient)
        written(losses, logits if gradient else None)
        return
    for rows in in_cache(len(logits), logits.shape[1], logits.device):
        part, label = logits[rows], labels[rows, None]
        p = torch.softmax(part, -1, dtype=losses.dtype)
        largest, at = p.max(-1, keepdim=True)       # the largest p is at least 1/V, so its logarithm is exact enough
        log_sum = part.gather(1, at).to(losses.dtype) - largest.log_()
        losses[rows] = (log_sum - part.gather(1, label) * (1 - smoothing))[:, 0]
        if smoothing:
            losses[rows] -= part.mean(-1, dtype=losses.dtype) * smoothing
            p -= smoothing / p.shape[1]
        if gradient:
            part.copy_(p.scatter_add_(1, label, p.new_full((len(p), 1), smoothing - 1)))


def losses_and_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float,
                        gradient: bool) -> tuple[Tensor, Tensor | None]:
    """hidden [n, d], weight [V, d], labels [n] -> (losses fp32 [n], d loss_t / d hidden_t [n, d] if wanted)."""
    losses = torch.empty(len(labels), dtype=_wide(hidden), device=hidden.device)
    d_hidden = torch.empty_like(hidden) if gradient else None
    for rows, part in _chunks(hidden, weight):
        losses_(part, labels[rows], losses[rows], smoothing, gradient)
        if d_hidden is not None:
            torch.mm(part, weight, out=d_hidden[rows])
    return losses, d_hidden


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits) of all of `hidden`; each chunk's logits take the memory of the last one's."""
    size = chunk_rows(len(weight), weight.device)
    grain = 16 if hidden.device.type == "cuda" else 1       # rows start where a GPU reads them 16 bytes at a time
    logits = hidden.new_empty(min(size, len(hidden)), -(-len(weight) // grain) * grain)[:, : len(weight)]
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        yield rows, torch.mm(hidden[rows], weight.mT, out=logits[: rows.stop - start])


def weighed(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, d] with each row times its weight, fp32 [n], in x's dtype."""
    if backends.choose("linear_cross_entropy", x.device, dtype=x.dtype) == "triton":
        from minitune.kernels import linear_cross_entropy as kernel

        return kernel.weigh(x, weights)
    return (x * weights[:, None]).to(x.dtype)


class _FrozenHead(torch.autograd.Function):
    """The gradient is formed in the forward pass, while a chunk's logits are at hand (Hsu et al. 2024, Liger Kernel).

    Token t's loss depends on hidden state t alone, so d loss_t / d hidden_t, kept as [n, d], serves any weighting of
    the tokens: the backward multiplies it by what arrives.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        losses, gradient = losses_and_gradient(hidden, weight, labels, smoothing, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return weighed(gradient, upstream), None, None, None


class _TrainedHead(torch.autograd.Function):
    """The weight's gradient is a sum over tokens, so it has to wait for what arrives for each of them: the backward
    makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.smoothing = smoothing
        return losses_and_gradient(hidden, weight.to(hidden.dtype), labels, smoothing, False)[0]

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        d_hidden, d_weight = gradients(hidden, weight.to(hidden.dtype), labels, ctx.smoothing, upstream,
                                       ctx.needs_input_grad[0])
        return d_hidden, d_weight.to(weight.dtype), None, None


def gradients(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, upstream: Tensor,
              need_hidden: bool) -> tuple[Tensor | None, Tensor]:
    """hidden [n, d], weight [V, d], labels [n], the losses' gradients fp32 [n] -> (d hidden [n, d] if needed, d weight
    fp32 [V, d]). The logits' gradients meet hidden states and results that are weighed: those are smaller."""
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = (weight.new_empty if len(hidden) else weight.new_zeros)(weight.shape, dtype=_wide(hidden))
    losses = torch.empty(len(labels), dtype=_wide(hidden), device=hidden.device)
    for rows, part in _chunks(hidden, weight):
        losses_(part, labels[rows], losses[rows], smoothing, True)
        x = weighed(hidden[rows], upstream[rows])
        for vocabulary in range(0, len(weight), VOCABULARY):
            product = part[:, vocabulary:vocabulary + VOCABULARY].mT @ x
            place = d_weight[vocabulary:vocabulary + VOCABULARY]
            if rows.start:
                place.add_(product)
            else:
                place.copy_(product)
        if d_hidden is not None:
            d_hidden[rows] = weighed(part @ weight, upstream[rows])
    return d_hidden, d_weight


def _composed(hidden: Tensor, labels: Tensor, smoothing: float, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden).to(_wide(hidden)), labels, reduction="none", label_smoothing=smoothing)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float = 0.0,
                         head: Head | None = None) -> Tensor:
    """hidden [n, d], head weight [V, d], labels int64 [n] without ignored ones -> negative log-likelihood fp32 [n],
    with label smoothing as in `reference`.

    A frozen head gets no gradient and costs none. With a trained one the backward computes the logits again, chunk by
    chunk; so it does, under plain autograd, with a ``head`` that has more to it than the weight (an adapter): hidden
    -> logits.
    """
    if head is None:
        trained = weight.requires_grad and torch.is_grad_enabled()
        losses: Tensor = (_TrainedHead.apply(hidden, weight, labels, smoothing) if trained else
                          _FrozenHead.apply(hidden, weight.detach().to(hidden.dtype), labels, smoothing))
        return losses
    size = chunk_rows(len(weight), weight.device)
    parts = [checkpoint(_composed, h, y, smoothing, head, use_reentrant=False)
             for h, y in zip(hidden.split(size), labels.split(size), strict=True)]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=_wide(hidden))
