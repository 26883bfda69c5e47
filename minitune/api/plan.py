"""plan: what a run would take, all that is known before its first step, beside what the machine has."""

from __future__ import annotations

import torch

from minitune.api.model import Model, trained_weights
from minitune.config import Training
from minitune.data.stream import Stream
from minitune.objectives import named
from minitune.training.loop import planned
from minitune.training.needs import LESS, gigabytes, longest_row, needs_of


def plan(model: Model, data: Stream, training: Training, done: int = 0) -> list[tuple[str, str]]:
    """(what, value) rows: the model, the data, the steps, the memory of a step by tensor kind beside what is free, and
    the loss of the first batch, for which one forward pass runs. ``done``: steps of a run that is resumed. Nothing is
    written, and the model is not changed.

    The bytes are those of weights, of what is trained (parameter, gradient, moments), of what the layers keep for the
    backward, and about those of the layer that is at work; their sum leaves out what is never there at one time, and
    buffers of single ops, such as a chunk of logits, come on top.
    """
    first = next(data.epoch(0))
    rows = [model_row(model, model.path), trained_row(model, training),
            ("data", f"{data.n_documents:,} {'pairs' if data.pairs else 'documents'}, {data.n_tokens:,} tokens, "
                     f"{data.n_trained:,} of them trained"),
            ("an epoch", f"{data.count(1):,} rows of {data.tokens:,} tokens, "
                         f"{data.n_tokens / (data.count(1) * data.tokens):.0%} full"),
            ("steps", f"{planned(data, training):,} of {training.micro_batches} x {data.tokens:,} tokens"
                      f"{f', {done:,} of them done' if done else ''}")]
    rows += _memory(model, longest_row(data, model.device) or data.tokens, training)
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            total, n = named(training)(model, first)
            rows.append(("loss of the first row", f"{float(total) / n:.4f}"))
    finally:
        model.train(was_training)
    return rows


def model_row(model: Model, name: object) -> tuple[str, str]:
    """Which model it is, in what and where."""
    config, kind = model.config, model.quant or str(model.network.dtype).removeprefix("torch.")
    return "model", f"{name}: {config.n_layers} layers x {config.d_model}, {kind} on {model.device}"


def trained_row(model: Model, training: Training) -> tuple[str, str]:
    """What of it is trained, and how."""
    return "trained", (f"{_count(model):,} parameters{_which(model)}, by {training.optimizer}, lr {training.lr:g}, "
                       f"{training.schedule}")


def _memory(model: Model, tokens: int, training: Training) -> list[tuple[str, str]]:
    needs = needs_of(model.network, tokens, training)
    fits = "" if needs.total <= needs.free else f"; it does not fit: {LESS}"
    rows = [("memory: weights, loaded", gigabytes(_held(model))),
            ("gradients and moments", gigabytes(needs.state)),
            (f"kept for the backward ({needs.policy})", gigabytes(needs.kept)),
            ("the layer at work, about", gigabytes(needs.work))]
    if needs.overlap:
        rows.append(("not at one time", f"{gigabytes(needs.overlap)}, gradients that come as what was kept goes"))
    return [*rows, ("to come, beside free", f"{gigabytes(needs.total)} of {gigabytes(needs.free)}{fits}")]


def _which(model: Model) -> str:
    return f" ({trained_weights(model.network)})" if model.network.trained_names() else ""


def _count(model: Model) -> int:
    return sum(p.numel() for p in model.trainable_parameters())


def _held(model: Model) -> int:
    """Bytes of weights and adapters; those in 4 bits are no parameters."""
    packed = sum(part.nbytes for projection in model.network.projections() for _, part in projection.nf4_parts())
    return packed + sum(p.numel() * p.element_size() for p in model.parameters())
