"""train: the whole fine-tuning of a Model in one call."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minitune.api.model import Model
from minitune.config import Training, short
from minitune.data.batch import Batch
from minitune.data.stream import Stream, stream
from minitune.errors import InputError
from minitune.objectives import sft
from minitune.training.loop import fit
from minitune.training.run import Observer, Run


def train(model: Model, data: str | Path | Iterable[Batch], *, training: Training | None = None,
          observers: Sequence[Observer] = (), **settings: Any) -> Run:
    """Fine-tune `model` on a JSONL file or on batches -> Run, the record of every step.

    `settings` are fields of Training (lr=1e-4, tokens=4096, …), or give a whole `training`. A path is tokenised and
    packed by `mt.data.stream`; batches are taken as they come.
    """
    if training is not None and settings:
        raise InputError(f"train: both training and {', '.join(settings)} are given; put all of it into one of them")
    unknown = settings.keys() - Training.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"train: no setting is named {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(Training.__dataclass_fields__)}")
    training = training or Training(**settings)
    if isinstance(data, str | Path):
        data = stream(data, model.tokenizer, tokens=training.tokens, seed=training.seed)
    elif not isinstance(data, Iterable):
        raise InputError(f"train: data is {short(data)}; give the path of a JSONL file, or batches")
    elif isinstance(data, Stream) and data.epochs not in (1, training.epochs):
        raise InputError(f"train: the stream has epochs={data.epochs}, the training epochs={training.epochs}; set "
                         "epochs in one place")
    objective = functools.partial(sft.sft, label_smoothing=training.label_smoothing)
    return fit(model, data, training, objective, observers)
