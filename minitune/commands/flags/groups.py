"""Groups of flags that several commands have: how held-out samples are read, and how each token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitune.config import Data, Long


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How held-out samples are read."""

    tokens: int = 2048
    """T, the length of one packed batch of the held-out data; no sample may be longer."""
    long: Long = "refuse"
    """A sample longer than --tokens: refuse it, split it (no context across pieces), truncate it or drop it."""
    field_map: tuple[str, ...] = ()
    """Your names of fields, as ours=yours: prompt=question completion=answer."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Settings of the model's chat template, as name=value: enable_thinking=false; by default the adapter's."""

    def template_kwargs(self) -> dict[str, Any] | None:
        """``chat_template_kwargs`` as `mt.load` takes them."""
        return Data(chat_template_kwargs=self.chat_template_kwargs).template_kwargs()

    def fields(self) -> dict[str, str]:
        """``field_map`` as a table {our field: their field}."""
        return Data(field_map=self.field_map).fields()


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
