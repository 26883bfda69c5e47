"""Document: the ids of one sample and which of them are trained; and how pieces of text become one."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

_TRUTH = bytes([0] + [1] * 255)


@dataclass(frozen=True)
class Document:
    """One sample, ready to be packed. ``ids`` and ``trained`` have one entry a token and are kept as compact arrays.

    ``trained[i]`` says whether token i is a target of the loss; the first token has no predecessor, so it never is.
    ``weight`` (positive, None: 1) multiplies the loss of its tokens. ``where`` is "file:line", for messages.
    """

    ids: Sequence[int]
    trained: Sequence[int]
    weight: float | None = None
    where: str = ""

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
        trained[0] = 0
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


class Segment(NamedTuple):
    """A piece of a sample's text. A ``trained`` one is the model's to say, and EOS is put behind it and trained too.

    ``parse_special``: control tokens that are written in its text are read as such, not as text. ``ends``: where False,
    a trained one gets no EOS.
    """

    text: str
    trained: bool
    parse_special: bool = False
    ends: bool = True


def encode_samples(samples: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """The (ids, trained) of each sample: BOS where the family has one, then its segments.

    Each segment is encoded by itself, without reading control tokens unless it says so, and to all but a sample's first
    the tokenizer adds no leading blank. So the ids of the first segments are the same whatever follows: a prompt at
    generation is exactly a prefix of the sample that was trained on. A BOS or EOS that a segment's own text spells
    (``parse_special``) is not put there a second time.
    """
    texts: dict[tuple[bool, bool], list[str]] = {}
    for sample in samples:
        for place, segment in enumerate(sample):
            texts.setdefault((place > 0, segment.parse_special), []).append(segment.text)
    encoded = {(continues, parse): iter(tokenizer.encode_many(some, False, False, parse, continues=continues))
               for (continues, parse), some in texts.items()}
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    results: list[tuple[list[int], list[bool]]] = []
    for sample in samples:
        ids: list[int] = []
        trained: list[bool] = []
        for place, segment in enumerate(sample):
            piece = next(encoded[place > 0, segment.parse_special])
            ids += piece
            closed = segment.parse_special and bool(piece) and piece[-1] in tokenizer.eos_ids
            if segment.trained and segment.ends and not closed:
                ids.append(tokenizer.require_eos())
            trained += [segment.trained] * (len(ids) - len(trained))
        if head and not (sample and sample[0].parse_special and ids[:1] == head):
            ids, trained = head + ids, [False] * len(head) + trained
        results.append((ids, trained))
    return results


__all__ = ["Document", "Segment", "encode_samples"]
