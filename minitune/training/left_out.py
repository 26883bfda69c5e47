"""LeftOut: a run's steps that changed nothing, as their loss or gradient was not finite or a spike: counted, named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from minitune.training.run import StepRecord

NAMED = 5
"""As many of a step's documents are named."""
NO_UPDATE_YET = ("No update came before, so the learning rate is not the cause: look for values that are not finite in "
                 "the weights that were loaded, for very large weights of samples, and at the objective, if it is your "
                 "own; dtype float32 may help")


class LeftOut:
    """Watches the steps of a run. `allowed`: as many in a row may be left out (``Training.max_skipped``). `name_of`:
    where a document of the data comes from, by its number in ``Batch.pieces``."""

    def __init__(self, allowed: int, name_of: Callable[[int], str]) -> None:
        self.allowed, self.name_of = allowed, name_of
        self.in_a_row = 0

    def resume(self, records: Sequence[StepRecord]) -> None:
        """Go on behind the steps of an interrupted run."""
        self.in_a_row = sum(1 for _ in takewhile(lambda record: record.left_out, reversed(records)))

    def count(self, record: StepRecord) -> None:
        """The next step."""
        self.in_a_row = self.in_a_row + 1 if record.left_out else 0

    @property
    def too_many(self) -> bool:
        return self.in_a_row > self.allowed

    def told(self, record: StepRecord, pieces: Sequence[int], spike: str = "") -> str:
        """A step that was left out, or is a spike, in a sentence without its end."""
        found = [*filter(None, [spike]), *(["left out, it changes no weight"] if record.left_out else [])]
        alike = f", the last of {self.in_a_row} such steps in a row" if self.in_a_row > 1 else ""
        names = ", ".join(self.name_of(piece) for piece in pieces[:NAMED])
        more = f" and {len(pieces) - NAMED:,} more" if len(pieces) > NAMED else ""
        source = f"; it read {names}{more}" if names else ""
        return f"{numbers(record)}: {', '.join(found)}{alike}{source}"


def numbers(record: StepRecord) -> str:
    return f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}, lr {record.lr:.3g}"
