"""A tiny language model and batches of unequal lengths, for the tests of the step, the loop and the reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minitune.data.batch import IGNORED, Batch

VOCAB = 11


class TinyModel(nn.Module):
    """Predicts the next token from the last one; B starts at zero like an adapter."""

    def __init__(self, lr_ratio: float | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, 6, generator=generator), requires_grad=False)
        self.A = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.B = nn.Parameter(torch.zeros(VOCAB, 4))
        self.lr_ratio = lr_ratio
        self.device = torch.device("cpu")
        self.modes: list[bool] = []

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        if self.lr_ratio is None:
            return [{"params": [self.A, self.B], "lr": lr}]
        return [{"params": [self.A], "lr": lr}, {"params": [self.B], "lr": lr * self.lr_ratio}]

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        self.modes.append(self.training)
        hidden = self.table[batch.tokens[batch.trained]]
        logits = hidden @ self.A.T @ self.B.T
        return nn.functional.cross_entropy(logits, batch.labels[batch.trained], reduction="sum"), batch.n_trained


def objective(model: TinyModel, batch: Batch) -> tuple[Tensor, int]:
    return model.loss_sum(batch)


def make_batch(*lengths: int, seed: int = 0, trained: bool = True) -> Batch:
    """Documents that count upwards from a random token; about the first third of each is not trained."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = [], []
    for length in lengths:
        start = int(torch.randint(VOCAB, (1,), generator=generator))
        document = (torch.arange(length) + start) % VOCAB
        target = torch.cat([document[1:], torch.tensor([IGNORED])])
        target[:length // 3 if trained else length] = IGNORED
        tokens.append(document)
        labels.append(target)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(tokens=torch.cat(tokens), labels=torch.cat(labels), cu_seqlens=bounds)
