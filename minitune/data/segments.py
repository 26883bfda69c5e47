"""Segments: the pieces of text that a sample is made of, and how they become ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer


class Segment(NamedTuple):
    """A piece of a sample's text. A ``trained`` one is the model's to say. EOS is put behind one that ``ends``, trained
    as it is. ``parse_special``: control tokens that are written in its text are read as such, not as text.
    """

    text: str
    trained: bool
    ends: bool = False
    parse_special: bool = False


Flagged = tuple[list[int], list[bool]]
"""ids, and which of them are trained."""


def encode_segments(samples: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[Flagged]:
    """The ids of each sample, flagged: BOS where the family has one, then its segments.

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
    results: list[Flagged] = []
    for sample in samples:
        ids: list[int] = []
        trained: list[bool] = []
        for place, segment in enumerate(sample):
            piece = next(encoded[place > 0, segment.parse_special])
            ids += piece
            closed = segment.parse_special and bool(piece) and piece[-1] in tokenizer.eos_ids
            if segment.ends and not closed:
                ids.append(tokenizer.require_eos())
            trained += [segment.trained] * (len(ids) - len(trained))
        if head and not (sample and sample[0].parse_special and ids[:1] == head):
            ids, trained = head + ids, [False] * len(head) + trained
        results.append((ids, trained))
    return results


__all__ = ["Flagged", "Segment", "encode_segments"]
