"""TokenRows: rows of the embedding, and of a head of its own, that are trained while the other rows stay frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """The rows of the tokens `ids`, fp32, in place of the frozen ones: for tokens that were added to a vocabulary, or
    whose meaning is to change. PEFT calls them trainable tokens.

    ``embedding`` [n, d_model]; ``head`` [n, d_model], or None: where the head is ``tied`` to the embedding the same
    rows serve both, else the head's rows stay frozen.
    """

    head: nn.Parameter | None
    slots: Tensor
    places: Tensor

    def __init__(self, ids: Sequence[int], embedding: Tensor, head: Tensor | None, tied: bool):
        super().__init__()
        self.ids, self.tied = tuple(sorted(set(ids))), tied
        places = torch.tensor(self.ids, device=embedding.device)
        self.embedding = nn.Parameter(embedding.detach()[places].float())
        self.register_parameter("head", None if head is None else nn.Parameter(head.detach()[places].float()))
        slots = torch.full((len(embedding),), -1, dtype=torch.int64, device=embedding.device)
        slots[places] = torch.arange(len(self.ids), device=embedding.device)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def embed(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [T, d_model], the frozen rows of tokens int64 [T] -> the same with the trained ones in their places."""
        slots = self.slots[tokens]
        own = F.embedding(slots.clamp(min=0), self.embedding).to(x.dtype)
        return torch.where((slots >= 0)[:, None], own, x)

    def logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """logits [n, vocab_size] of the frozen head -> those with the columns of the trained tokens anew."""
        rows = self.embedding if self.tied else self.head
        if rows is None:
            return logits
        return logits.index_copy(1, self.places, (hidden @ rows.to(hidden.dtype).mT).to(logits.dtype))

    @torch.no_grad()
    def take(self, known: TokenRows) -> None:
        """The values of rows that were trained before."""
        places = torch.tensor([self.ids.index(token) for token in known.ids], device=self.embedding.device)
        self.embedding[places] = known.embedding
        if self.head is not None and known.head is not None:
            self.head[places] = known.head

    @torch.no_grad()
    def written(self, weight: Tensor, of_head: bool) -> Tensor:
        """A copy of the embedding or head [vocab_size, d_model] with the trained rows in it, rounded to its dtype."""
        rows = self.head if of_head and not self.tied else self.embedding
        if rows is None:
            return weight
        return weight.index_copy(0, self.places.to(weight.device), rows.to(weight.device, weight.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.ids)} tokens"
