"""Needs: the memory that the steps of a run will take, by kind of tensor, beside what is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from minitune.config import MemoryPolicy, Training
from minitune.data.batch import GRAIN, Batch
from minitune.data.stream import Stream
from minitune.model.llama import Llama
from minitune.model.memory import free_bytes, step_bytes
from minitune.training.flat import is_whole

LESS = "fewer tokens, a smaller rank, moments 8bit or quant nf4-dq take less"


class Needs(NamedTuple):
    """Bytes: gradients and moments; what lies between forward and backward; about those that the backward takes beside
    it; what of their sum is never there at one time; what is free now. ``policy``: the memory policy."""

    state: int
    kept: int
    work: int
    overlap: int
    free: int
    policy: MemoryPolicy

    @property
    def total(self) -> int:
        """What is to come beside the weights, which are loaded. Buffers of single ops, such as a chunk of logits, come
        on top."""
        return self.state + self.kept + self.work - self.overlap


def needs_of(network: Llama, tokens: int, training: Training) -> Needs:
    """Those of steps with rows of so many tokens, before the first one."""
    policy = network.policy_of(tokens)
    trained = [p for p in network.parameters() if p.requires_grad]
    kept, work = step_bytes(network.config, tokens, policy, network.dtype, network.device, network.needs_composed,
                            network.trained_values())
    # Large gradients begin with the first backward, which takes what was kept away as it makes them.
    large = 4 * sum(p.numel() for p in trained if is_whole(p))
    return Needs(state=sum(p.numel() for p in trained) * (4 + moment_bytes(training)), kept=kept, work=work,
                 overlap=min(large, kept) if training.micro_batches == 1 else 0, free=free_bytes(network.device),
                 policy=policy)


def moment_bytes(training: Training) -> int:
    """Of one trained value, in the optimizer."""
    if training.optimizer == "sgd":
        return 4 if training.momentum else 0
    return 2 if training.moments == "8bit" else 8


def longest_row(batches: Iterable[Batch], device: torch.device) -> int | None:
    """The largest T of the batches, on a CPU without what is certain to be filler; None where it shows only as they
    come."""
    if isinstance(batches, Stream):
        return batches.tokens if device.type != "cpu" else min(batches.tokens, -(-batches.n_tokens // GRAIN) * GRAIN)
    if not isinstance(batches, Sequence):
        return None
    return max(((batch.trimmed() if device.type == "cpu" else batch).n_tokens for batch in batches), default=None)


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


__all__ = ["LESS", "Needs", "gigabytes", "longest_row", "moment_bytes", "needs_of"]
