"""pairs: what preference training (objective dpo) asks of the model and of the data, checked before a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minitune.api.model import Model
from minitune.arguments import short
from minitune.config import Training
from minitune.data.batch import Batch
from minitune.data.stream import Stream
from minitune.errors import InputError


def check_pairs(model: Model, training: Training, batches: Iterable[Batch], held_out: Iterable[Batch] | None,
                resumed: bool) -> None:
    """InputError unless model and data are what the named objective takes: dpo a new adapter and pairs, sft none.

    The base under the adapter is the reference, so weights of the base that are trained, and an adapter that has been
    trained before, would make another one of it. A run that is ``resumed`` has its adapter from the checkpoint.
    """
    pairs = training.objective == "dpo"
    for name, data in (("data", batches), ("valid", held_out)):
        if data is not None:
            _check_data(name, data, pairs)
    if not pairs:
        return
    if model.network.trained_names():
        raise InputError("train: the objective is dpo, whose reference is the base under an adapter, and the base "
                         "itself is trained; load the model with lora=mt.LoRA(…), without train")
    if not resumed and any(bool(adapter.B.any()) for adapter in model.network.adapters().values()):
        raise InputError("train: the objective is dpo, whose reference is the base under a new adapter, and this "
                         "adapter has been trained; merge it into the base first (minitune merge, model.save_merged), "
                         "and train a new one on that")


def _check_data(name: str, data: Any, pairs: bool) -> None:
    if pairs and not (isinstance(data, Stream) and data.pairs):
        raise InputError(f"train: the objective is dpo, and {name} is {short(data)}, which holds no pairs of answers; "
                         "give a file, samples, or mt.data.stream(…, pairs=True)")
    if not pairs and isinstance(data, Stream) and data.pairs:
        raise InputError(f"train: {name} holds pairs of answers, the rejected ones among them, and the objective is "
                         'sft; say objective="dpo", or read it without pairs=True')


__all__ = ["check_pairs"]
