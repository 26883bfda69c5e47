"""What is minimised: one file an objective, each a function (model, batch) -> (sum of losses, how many they are)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minitune.config import Training
from minitune.data.batch import Batch
from minitune.objectives import dpo, sft


def takes_pairs(objective: object) -> bool:
    """Whether it is of pairs of answers, which the data is then read as."""
    return getattr(objective, "takes_pairs", False) is True


def with_reference(objective: object) -> bool:
    """Whether it compares the model with the base under its adapter, for which a step has one forward more."""
    return getattr(objective, "with_reference", False) is True


def named(training: Training) -> Callable[[Any, Batch], tuple[Tensor, int]]:
    """The objective that the settings name."""
    if training.objective == "dpo":
        return dpo.DPO(training.beta)
    return functools.partial(sft.sft, label_smoothing=training.label_smoothing)
