"""Head: from hidden states to logits and losses, with an adapter and trained token rows where there are any."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LoRA
from minitune.model.adapter import HEAD, Adapter, make_adapter
from minitune.model.token_rows import TokenRows
from minitune.ops import dora, few_rows
from minitune.ops.linear_cross_entropy import linear_cross_entropy
from minitune.ops.versions import unwritten


class Head(nn.Module):
    """The output layer. Its weight [vocab_size, d_model], which may be the embedding, is the network's and is given to
    each call; what is trained beside it is here."""

    adapter: Adapter | None
    rows: TokenRows | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("adapter", None)
        self.register_module("rows", None)
        self.enabled = True
        self.lengths: Tensor | None = None      # of the rows, for DoRA
        self.packed: Tensor | None = None       # the weight for generation of several sequences on a CPU

    @property
    def is_adapted(self) -> bool:
        """Whether more than the weight stands here, and is switched on."""
        return self.enabled and (self.adapter is not None or self.rows is not None)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [n, d_model] -> fp32 [n, vocab_size]."""
        logits = few_rows.product(hidden, weight.to(hidden.dtype), None, self.packed)
        return self._with_trained(hidden, logits).float()

    def losses_at(self, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels int64 [n] -> negative log-likelihood fp32 [n]; logits are never whole."""
        if not self.is_adapted:
            return linear_cross_entropy(hidden, weight, labels, smoothing)
        head = unwritten(lambda part: self._with_trained(part, F.linear(part, weight.to(part.dtype))),
                         (weight, *self.parameters()))
        return linear_cross_entropy(hidden, weight, labels, smoothing, head)

    def _with_trained(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The frozen weight's logits [n, vocab_size] with what is trained beside it, if it is switched on."""
        if not self.is_adapted:
            return logits
        if self.adapter is not None:
            logits = logits + self.adapter(hidden)
            if self.adapter.m is not None and self.lengths is not None:
                logits = logits * self.adapter.gain(self.lengths)
        return logits if self.rows is None else self.rows.logits(logits, hidden)

    def add_adapter(self, lora: LoRA, seed: int, weight: Tensor) -> None:
        """An adapter, if `lora.targets` names the head."""
        self.adapter = make_adapter(HEAD, weight.shape[1], len(weight), lora, seed, weight.device)
        if self.adapter is not None and self.adapter.m is not None:
            self.adapter.start_magnitude(dora.row_lengths(weight, None, None))

    @torch.no_grad()
    def refresh(self, weight: Tensor, dtype: torch.dtype) -> None:
        """For DoRA: how long the rows are with the adapter as it stands."""
        if self.adapter is not None and self.adapter.m is not None:
            a, b = self.adapter.A.to(dtype), (self.adapter.B * self.adapter.scale).to(dtype)
            self.lengths = dora.row_lengths(weight, a, b)
