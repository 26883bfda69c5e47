"""Document: the ids of one sample and which of them are trained, ready to be packed."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from minitune.errors import InputError

_TRUTH = bytes([0] + [1] * 255)


@dataclass(frozen=True)
class Document:
    """One sample, ready to be packed. ``ids`` and ``trained`` have one entry a token and are kept as compact arrays.

    ``trained[i]`` says whether token i is a target of the loss; the first token has no predecessor, so it never is.
    ``weight`` (positive, None: 1) multiplies the loss of its tokens. ``where`` is "file:line", for messages. A pair of
    answers is one document: from token ``rejected_at`` on it is the rejected one, with its prompt; 0: it is no pair.
    """

    ids: Sequence[int]
    trained: Sequence[int]
    weight: float | None = None
    where: str = ""
    rejected_at: int = 0

    def __post_init__(self) -> None:
        name = self.where or "document"
        if not len(self.ids):
            raise InputError(f"{name}: has no tokens")
        if len(self.ids) != len(self.trained):
            raise InputError(f"{name}: has {len(self.ids)} ids but {len(self.trained)} trained flags; give as many")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"{name}: weight is {self.weight!r}; it must be a positive, finite number")
        try:
            ids = array("i", self.ids)
        except (OverflowError, TypeError) as error:
            raise InputError(f"{name}: its ids must be integers below 2**31 ({error})") from error
        if min(ids) < 0:
            raise InputError(f"{name}: {min(ids)} is no token id")
        trained = _flags(self.trained)
        if not 0 <= self.rejected_at < len(ids):
            raise InputError(f"{name}: rejected_at is {self.rejected_at}; it must be below its {len(ids)} tokens")
        trained[0] = trained[self.rejected_at] = 0
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "trained", trained)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_trained(self) -> int:
        """How many of its tokens are targets."""
        return sum(self.trained)


def _flags(values: Sequence[int]) -> array[int]:
    """0 or 1 for each value: a data set has one a token, so the usual kinds of them take no loop of Python's."""
    if isinstance(values, list | tuple | bytes) or (isinstance(values, array) and values.itemsize == 1):
        with contextlib.suppress(TypeError, ValueError):        # no integers, or large ones
            return array("b", bytes(values).translate(_TRUTH))
    return array("b", map(bool, values))


__all__ = ["Document"]
