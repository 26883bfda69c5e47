"""What `train` names of a base: words such as "norms" and "last:2", or patterns, as patterns of Hugging Face names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from minitune.config import ModelConfig
from minitune.errors import InputError
from minitune.model.adapter import matches


def train_patterns(train: str | Iterable[str], config: ModelConfig, names: Collection[str],
                   quantized: Collection[str]) -> tuple[str, ...]:
    """The patterns that `train` says: "full", "head", "norms", "embedding", "last:k" (layers), a pattern, or several.

    names: those of the weights that can be trained; `quantized`: those of linears in 4 bits (their biases are among
    `names`). InputError for a word or a pattern that names nothing, or a linear in 4 bits.
    """
    patterns = _patterns(train, config, [*names, *quantized])
    for weight in quantized:
        for name in (weight, weight.removesuffix("weight") + "bias"):
            if any(matches(pattern, name) for pattern in patterns):
                raise InputError(f"train: {train!r} names {name}; linears in 4 bits cannot be trained, nor their "
                                 'biases: take a base in 16 bits, or name other weights ("norms", "head")')
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            meant = next((near for near in (f"*{pattern}.weight", f"{pattern}.*")
                          if any(matches(near, name) for name in names)), None)
            advice = (f'did you mean "{meant}"?' if meant else
                      'names look like "model.layers.0.self_attn.q_proj.weight"')
            raise InputError(f"train: {pattern!r} names no weight of this model; {advice}")
    return patterns


def _patterns(train: str | Iterable[str], config: ModelConfig, names: Collection[str]) -> tuple[str, ...]:
    if not isinstance(train, str):
        return tuple(pattern for each in train for pattern in _of_word(each, config) or (each,))
    patterns = _of_word(train, config)
    if patterns is not None:
        return patterns
    if any(sign in train for sign in "*?[._") or any(matches(train, name) for name in names):
        return (train,)
    raise InputError(f'train: {train!r} is not known; say "full", "head", "norms", "embedding", "last:k" with k from 1 '
                     f'to {config.n_layers}, a name pattern such as "*.q_proj.weight", or a list')


def _of_word(word: str, config: ModelConfig) -> tuple[str, ...] | None:
    """What a word such as "norms" or "last:2" stands for; None for any other text. A tied head is the embedding."""
    head = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
    known = {"full": ("*",), "head": (head,), "norms": ("*norm.weight",), "embedding": ("model.embed_tokens.weight",)}
    kind, _, count = word.partition(":")
    if kind == "last" and count.isdigit() and 0 < int(count) <= config.n_layers:
        return tuple(f"model.layers.{i}.*" for i in range(config.n_layers - int(count), config.n_layers))
    return known.get(word)
