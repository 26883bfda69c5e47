"""encode: samples to Documents, many at once, so that the tokenizer libraries work on all cores."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from minitune.data.chat import encode_conversations
from minitune.data.conversations import REASONING, is_trained
from minitune.data.corpus import BLANK, OPEN, SPOILT
from minitune.data.formats import SAME, Sample
from minitune.data.segments import Flagged, encode_segments
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

CHUNK_SAMPLES, CHUNK_CHARACTERS = 2048, 4_000_000
"""A chunk is encoded at once: enough for every core, little beside the data set."""
_LONG = ("content", "tool_calls", *REASONING)
"""The fields of a message that may be long."""


class Encoded(NamedTuple):
    """One sample of a file, encoded. ``where`` is "file:line".

    ``ids`` int32 [n] and ``trained`` [n], 1 for a target (the first token never is one), else 0; both are empty where
    the whole sample is unused. ``weight`` multiplies its loss (None: 1). ``n_dropped`` are the tokens of its unused
    text, ``reason`` says why it is ("": there is none). ``flags``: what of `Corpus.flags` the sample itself tells.
    ``rejected_at``: where of a pair the rejected answer's prompt begins, behind the chosen answer; 0: it is no pair.
    """

    where: str
    ids: array[int]
    trained: bytes
    weight: float | None = None
    n_dropped: int = 0
    reason: str = ""
    flags: int = 0
    rejected_at: int = 0


def encode(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Encoded]:
    """Encodes samples, all their texts together and all their conversations together, in the order given.

    Unused texts are encoded as well, since the ledger counts tokens. Raises InputError that names the sample.
    """
    sides = [side for sample in samples for side in _sides(sample)]
    pieces = iter(_encode_texts([side for side in sides if side.segments is not None], tokenizer))
    talks = iter(encode_conversations([(side.messages, side.tools, side.where)
                                       for side in sides if side.messages is not None], tokenizer))
    unused = [sample.unused.text for sample in samples if sample.unused]
    counts = iter(map(len, tokenizer.encode_many(unused, bos=False)) if unused else ())
    found: list[Encoded] = []
    for sample in samples:
        ids: list[int] = []
        trained: list[bool] = []
        rejected_at = 0
        for side in _sides(sample):
            own, targets = next(pieces if side.segments is not None else talks)
            if not own:
                raise InputError(f"{sample.where}: the tokenizer makes no token of it; write some text or remove the "
                                 "sample")
            targets[0] = False      # nothing stands before it
            if sample.rejected and not any(targets):
                raise InputError(f"{sample.where}: nothing is trained of the {'rejected' if ids else 'chosen'} answer: "
                                 "its turns have weight 0; remove the weights or the sample")
            rejected_at = len(ids)
            ids, trained = ids + own if ids else own, trained + targets if ids else targets
        dropped, reason = (next(counts), sample.unused.reason) if sample.unused else (0, "")
        if rejected_at and ids[:rejected_at] == ids[rejected_at:]:      # such as under a template that trims them
            dropped, reason, ids, trained, rejected_at = len(ids), SAME, [], [], 0
        flags = _flags(sample) if sample.rejected is None else _flags(sample) | _flags(sample.rejected) & ~BLANK
        found.append(Encoded(sample.where, array("i", ids), bytes(trained), sample.weight, dropped, reason, flags,
                             rejected_at))
    return found


def _sides(sample: Sample) -> tuple[Sample, ...]:
    """What of it becomes tokens: nothing, itself, or of a pair both."""
    if sample.segments is None and sample.messages is None:
        return ()
    return (sample,) if sample.rejected is None else (sample, sample.rejected)


def _encode_texts(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Flagged]:
    """`encode_segments` of the samples' segments; its error names the sample."""
    try:
        return encode_segments([sample.segments or [] for sample in samples], tokenizer)
    except InputError:
        for sample in samples:
            try:
                encode_segments([sample.segments or []], tokenizer)
            except InputError as error:
                raise InputError(f"{sample.where}: {error}") from error
        raise


def chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """`samples` in lists of at most CHUNK_SAMPLES and about CHUNK_CHARACTERS."""
    chunk: list[Sample] = []
    characters = 0
    try:
        for sample in samples:
            chunk.append(sample)
            characters += _characters(sample)
            if len(chunk) >= CHUNK_SAMPLES or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except InputError:      # a fault of those before it comes first
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _texts(sample: Sample) -> list[str]:
    """What a sample says, in segments or messages."""
    texts = [segment.text for segment in sample.segments or ()]
    texts += [str(message[field]) for message in sample.messages or () for field in _LONG if message.get(field)]
    return texts


def _characters(sample: Sample) -> int:
    beside = [sample.unused.text] if sample.unused else []
    if sample.tools:
        beside.append(str(sample.tools))
    return sum(map(len, _texts(sample) + beside)) + (_characters(sample.rejected) if sample.rejected else 0)


def _flags(sample: Sample) -> int:
    spoilt = any("\ufffd" in text or "\0" in text for text in _texts(sample))
    ends_open = sample.messages is not None and sample.messages[-1]["role"] != "assistant"
    return BLANK * _is_blank(sample) + SPOILT * spoilt + OPEN * ends_open


def _is_blank(sample: Sample) -> bool:
    """Whether a sample has answers to train and all of them are blank."""
    answers = [segment.text for segment in sample.segments or () if segment.trained]
    for message in sample.messages or ():
        if is_trained(message):
            if message.get("tool_calls"):
                return False
            answers.append(str(message.get("content") or ""))
    return bool(answers) and not any(map(str.strip, answers))


__all__ = ["CHUNK_CHARACTERS", "CHUNK_SAMPLES", "Encoded", "chunks", "encode"]
