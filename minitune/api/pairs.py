"""pairs: what an objective of pairs, such as dpo, asks of the model and of the data, checked before a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from minitune.api.model import Model
from minitune.arguments import short
from minitune.data.batch import Batch
from minitune.data.stream import Stream
from minitune.errors import InputError
from minitune.objectives import takes_pairs, with_reference
from minitune.training.step import Objective


def check_pairs(model: Model, objective: Objective, name: str, batches: Iterable[Batch],
                held_out: Iterable[Batch] | None, resumed: bool) -> None:
    """InputError unless model and data are what the objective of this `name` takes: dpo a new adapter and pairs, sft
    none; a function of the caller's own takes what it likes, but is not evaluated on pairs.

    The base under the adapter is the reference, so weights of the base that are trained, and an adapter that has been
    trained before, would make another one of it. A run that is ``resumed`` has its adapter from the checkpoint.
    """
    for place, data in (("data", batches), ("valid", held_out)):
        if takes_pairs(objective):
            _check_pairs(place, data, name, objective)
        elif isinstance(data, Stream) and data.pairs and (name == "sft" or place == "valid"):
            measured = "is evaluated by the loss of the next token (with takes_pairs and evaluate it would not)"
            raise InputError(f"train: {place} holds pairs of answers, the rejected ones among them, and the objective "
                             f"{name} " + ('takes none; say objective="dpo", or read it without pairs=True'
                                           if name == "sft" else f"{measured}; read it without pairs=True"))
    if not with_reference(objective):
        return
    if model.network.trained_names():
        raise InputError(f"train: the objective is {name}, whose reference is the base under an adapter, and the base "
                         "itself is trained; load the model with lora=mt.LoRA(…), without train (on the command line: "
                         "without --train)")
    if not resumed and any(bool(adapter.B.any()) for adapter in model.network.adapters().values()):
        raise InputError(f"train: the objective is {name}, whose reference is the base under a new adapter, and this "
                         "adapter has been trained; merge it into the base first (minitune merge, model.save_merged), "
                         "and train a new one on that")


def _check_pairs(place: str, data: Any, name: str, objective: Any) -> None:
    """InputError where data is no stream of pairs, or a list with a batch that is no pairs."""
    if isinstance(data, Stream) and not data.pairs:
        raise InputError(f"train: the objective is {name}, and {place} is {short(data)}, which holds no pairs of "
                         "answers; give a file, samples, or mt.data.stream(…, pairs=True)")
    if isinstance(data, Sequence) and hasattr(objective, "n_losses"):
        for batch in data:
            objective.n_losses(batch)


__all__ = ["check_pairs"]
