"""dpo: direct preference optimization, which raises a chosen answer over a rejected one, against the base."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.arguments import check_positive
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.objectives.evaluate import placed


class WithReference(Protocol):
    """What this objective asks of a model."""

    training: bool

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def token_losses(self, batch: Batch) -> Tensor:
        """fp32 [T]: negative log-likelihood at trained positions, 0 elsewhere."""

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Within it the model is the reference."""

    def train(self, mode: bool) -> object:
        """Switch dropout on or off."""


@dataclass(frozen=True, kw_only=True)
class Preferred:
    """``loss`` is the mean of `DPO` over the pairs, ``accuracy`` the share of them whose chosen answer has gained more
    on the base than the rejected one (one half where both have gained alike), ``n_tokens`` their trained tokens.
    ``chosen`` and ``rejected`` are by how many nats the log-probability of the one, and of the other, has risen over
    the base's, on average."""

    loss: float
    accuracy: float
    n_tokens: int
    chosen: float
    rejected: float


@dataclass(frozen=True)
class DPO:
    """Rafailov et al. 2023 (arXiv:2305.18290), equation 7, the mean over the pairs of a step:

    -log sigmoid(beta · ((log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))))

    p is the model with its adapter, p_base the one without, so nothing is loaded twice and a step costs one forward
    more. A batch holds pairs: document 2i is a chosen answer behind its prompt, 2i + 1 the rejected one; a log p is the
    sum over the trained tokens of its document. The first loss of a new adapter is ln 2. A sample's weight multiplies
    the loss of its pair. Another loss of the same margins is a class with another `losses`. ``beta`` is above 0.
    """

    beta: float = 0.1
    takes_pairs: ClassVar[bool] = True
    with_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("dpo", beta=self.beta)

    def n_losses(self, batch: Batch) -> int:
        """How many losses there are to a batch, by which a step divides: its pairs. InputError where it holds none."""
        n_documents = len(batch.lengths)
        if n_documents == 0 or n_documents % 2 or batch.pieces[0::2] != batch.pieces[1::2]:
            raise InputError(f"dpo: a batch holds {n_documents} document{'' if n_documents == 1 else 's'} that are no "
                             "pairs of a chosen and a rejected answer, as mt.data.stream(…, pairs=True) gives them")
        return n_documents // 2

    def __call__(self, model: WithReference, batch: Batch) -> tuple[Tensor, int]:
        """(sum over the pairs of weight · loss, fp32 scalar; how many pairs there are)."""
        losses = self.losses(self.margins(model, batch))
        if batch.weights is not None:
            chosen = batch.cu_seqlens[:-1][0:2 * len(losses):2].long()
            losses = losses * batch.weights[chosen].to(losses.device)
        return losses.sum(), len(losses)

    def losses(self, margins: Tensor) -> Tensor:
        """The loss of each pair, of its margin: fp32 [pairs] to fp32 [pairs]."""
        return -F.logsigmoid(self.beta * margins)

    def margins(self, model: WithReference, batch: Batch) -> Tensor:
        """fp32 [pairs]: by how many nats the chosen answer has gained more on the base than the rejected one."""
        chosen, rejected = self.gains(model, batch)
        return chosen - rejected

    def gains(self, model: WithReference, batch: Batch) -> tuple[Tensor, Tensor]:
        """By how many nats each chosen answer's log-probability has risen over the base's, and each rejected one's:
        fp32 [pairs] both."""
        n = 2 * self.n_losses(batch)
        with torch.no_grad(), model.adapter_disabled():
            base = model.token_losses(batch)
        gained = base - model.token_losses(batch)
        answers = [each.sum() for each in gained.split(list(batch.documents.lengths))[:n]]
        return torch.stack(answers[0::2]), torch.stack(answers[1::2])

    @torch.no_grad()
    def evaluate(self, model: WithReference, batches: Iterable[Batch]) -> Preferred:
        """The Preferred of pairs, each counted alike, in eval mode; of a stream one epoch is taken. The device is asked
        once, at the end. InputError where there are no pairs."""
        was_training = model.training
        model.train(False)
        sums, n_pairs, n_tokens = torch.zeros(4, dtype=torch.float64, device=model.device), 0, 0
        try:
            for batch in placed(model, batches):
                chosen, rejected = self.gains(model, batch)
                ahead = (chosen > rejected) + 0.5 * (chosen == rejected)
                found = [self.losses(chosen - rejected), ahead, chosen, rejected]
                sums += torch.stack(found).sum(1, dtype=torch.float64)
                n_pairs, n_tokens = n_pairs + len(chosen), n_tokens + batch.n_trained
        finally:
            model.train(was_training)
        loss, accuracy, gained, lost = (sums / n_pairs).tolist()
        return Preferred(loss=loss, accuracy=accuracy, n_tokens=n_tokens, chosen=gained, rejected=lost)
