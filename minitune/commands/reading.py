"""The flags of `evaluate` and `merge` about how held-out samples are read."""

from __future__ import annotations

from dataclasses import dataclass

from minitune.config import Data, Long


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How held-out samples are read."""

    tokens: int = 2048
    """T, the length of one packed batch of the held-out data; no sample may be longer."""
    long: Long = "refuse"
    """A sample longer than --tokens: refuse it, split it (no context across pieces) or truncate it."""
    field_map: tuple[str, ...] = ()
    """Your names of fields, as ours=yours: prompt=question completion=answer."""

    def fields(self) -> dict[str, str]:
        """``field_map`` as a table {our field: their field}."""
        return Data(field_map=self.field_map).fields()
