"""Document: the ids of one sample and which of them are trained; and how pieces of text become one."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


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
        trained = array("b", map(bool, self.trained))
        trained[0] = 0
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "trained", trained)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_trained(self) -> int:
        """How many of its tokens are targets."""
        return sum(self.trained)


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text. A ``trained`` one is the model's to say, and EOS is put behind it and trained too.

    ``continues``: it follows other text, so the tokenizer adds no leading blank.
    """

    text: str
    trained: bool
    continues: bool


def encode_samples(samples: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """The (ids, trained) of each sample: BOS where the family has one, then its segments.

    Each segment is encoded by itself, without reading control tokens. So the ids of a sample's first segments are the
    same whatever follows: a prompt at generation is exactly a prefix of the sample that was trained on.
    """
    encoded: dict[bool, list[list[int]]] = {}
    for continues in (False, True):
        texts = [segment.text for sample in samples for segment in sample if segment.continues == continues]
        encoded[continues] = tokenizer.encode_many(texts, bos=False, continues=continues)[::-1] if texts else []
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    found: list[tuple[list[int], list[bool]]] = []
    for sample in samples:
        ids, trained = list(head), [False] * len(head)
        for segment in sample:
            piece = encoded[segment.continues].pop()
            if segment.trained:
                piece = [*piece, tokenizer.require_eos()]
            ids += piece
            trained += [segment.trained] * len(piece)
        found.append((ids, trained))
    return found


__all__ = ["Document", "Segment", "encode_samples"]
