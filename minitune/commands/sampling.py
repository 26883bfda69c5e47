"""The flags of `complete` and `chat` about how each token is chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen, and what ends an answer early."""

    temperature: float = 0.0
    """0 is greedy, more is bolder."""
    top_k: int | None = None
    """Draw among so many likeliest tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens whose probabilities reach this."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    seed: int | None = None
    """Random seed of the draws."""
