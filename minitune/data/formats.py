"""The sample formats: which one a JSONL line is in, what of it is trained, and the Documents of a whole file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.config import short
from minitune.data.chat import announce_plain_template, check_messages, render_prompt
from minitune.data.document import Document, Segment, encode_samples
from minitune.data.jsonl import read_jsonl
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

FORMATS: tuple[tuple[str, ...], ...] = (("text",), ("prompt", "completion"), ("messages",))
"""The fields by which each format is recognised."""

KNOWN = ("text", "prompt", "completion", "messages", "weight")

MEANINGFUL = frozenset((
    "instruction", "input", "output", "inputs", "conversations", "chosen", "rejected", "preferred_output",
    "non_preferred_output", "label", "tools", "functions", "images", "audio", "videos", "system", "suffix",
    "multiplier"))
"""Fields of other formats. Beside a known format they would change what a sample teaches, so they are not ignored."""

_CHUNK_SAMPLES, _CHUNK_CHARACTERS = 1024, 4_000_000


def to_segments(sample: Mapping[str, Any], where: str) -> list[Segment]:
    """The pieces of one sample, trained or not.

    {"text"}: all of it is trained. {"prompt", "completion"}: the completion. {"messages": [{"role", "content"}]}: the
    assistant's turns. EOS follows, trained, after the text, the completion, each assistant's turn.

    The rule on fields: null counts as absent. Exactly one format's fields must be there, complete. "weight" (a positive
    number, multiplies this sample's loss) may be. Other fields (id, source, …) are ignored, except those that look
    like a misspelling of one of ours and those that have a meaning in another format (`MEANINGFUL`). Raises InputError
    that names `where`, the field, and what is accepted.
    """
    fields = {key: value for key, value in sample.items() if value is not None}
    kind = _recognise(fields, where)
    if kind == "messages":
        check_messages(fields["messages"], where)
        if all(message["role"] != "assistant" for message in fields["messages"]):
            raise InputError(f"{where}: messages has no assistant turn, so there is nothing to train on; add one")
        return render_prompt(fields["messages"], add_generation_prompt=False)
    for name in ("text",) if kind == "text" else ("prompt", "completion"):
        if not isinstance(fields[name], str):
            raise InputError(f"{where}: {name} is {short(fields[name])}; it must be a string")
    trained = "text" if kind == "text" else "completion"
    if not fields[trained]:
        raise InputError(f"{where}: {trained} is empty, so there is nothing to train on; write some or remove the line")
    if kind == "text" or not fields["prompt"]:
        return [Segment(fields[trained], True, False)]
    return [Segment(fields["prompt"], False, False), Segment(fields["completion"], True, True)]


def _recognise(fields: Mapping[str, Any], where: str) -> str:
    """The first field of the sample's format."""
    accepted = '{"text"}, {"prompt", "completion"} or {"messages"}'
    begun = [names for names in FORMATS if any(name in fields for name in names)]
    others = [name for name in fields if name not in KNOWN]
    for name in others:
        close = get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.83)
        if close:
            raise InputError(f"{where}: unknown field {name!r}; did you mean {close[0]!r}?")
    if not begun:
        found = ", ".join(repr(name[:40]) for name in others[:6]) or "none"
        raise InputError(f"{where}: no known format; accepted: {accepted}; found the fields: {found}")
    if len(begun) > 1:
        present = " and ".join(repr(name) for names in begun for name in names if name in fields)
        raise InputError(f"{where}: {present} belong to different formats; keep one of {accepted}")
    missing = [name for name in begun[0] if name not in fields]
    if missing:
        present = next(name for name in begun[0] if name in fields)
        raise InputError(f"{where}: the field {missing[0]!r} is missing beside {present!r}; accepted: {accepted}")
    meaningful = [name for name in others if name in MEANINGFUL]
    if meaningful:
        raise InputError(f"{where}: the field {meaningful[0]!r} is not read beside {begun[0][0]!r}, and would change "
                         f"what the sample means; remove it (accepted: {accepted}, weight, and fields without effect)")
    return begun[0][0]


def _weight(sample: Mapping[str, Any], where: str) -> float | None:
    weight = sample.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e30:
        raise InputError(f"{where}: weight is {repr(weight)[:40]}; it must be a positive number below 1e30")
    return float(weight)


def to_documents(samples: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, wheres: Sequence[str]) -> list[Document]:
    """The Documents of many samples, encoded together; ``wheres`` name them ("file:line")."""
    segments = [to_segments(sample, where) for sample, where in zip(samples, wheres, strict=True)]
    weights = [_weight(sample, where) for sample, where in zip(samples, wheres, strict=True)]
    encoded = encode_samples(segments, tokenizer)
    return [Document(ids, trained, weight, where)
            for (ids, trained), weight, where in zip(encoded, weights, wheres, strict=True)]


def to_document(sample: Mapping[str, Any], tokenizer: Tokenizer, where: str = "sample") -> Document:
    """The Document of one sample: see `to_segments` for what is accepted and trained."""
    if "messages" in sample:
        announce_plain_template(tokenizer)
    return to_documents([sample], tokenizer, [where])[0]


def read_documents(path: str | Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yields the Document of each sample of a JSONL file, in the file's order, encoding in chunks on all cores.

    Warns once if there are messages and the tokenizer has a chat template of its own, which is not used.
    """
    samples: list[dict[str, Any]] = []
    wheres: list[str] = []
    characters, announced = 0, False
    for number, sample in read_jsonl(path):
        if "messages" in sample and not announced:
            announce_plain_template(tokenizer)
            announced = True
        samples.append(sample)
        wheres.append(f"{path}:{number}")
        characters += _size(sample)
        if len(samples) >= _CHUNK_SAMPLES or characters >= _CHUNK_CHARACTERS:
            yield from to_documents(samples, tokenizer, wheres)
            samples, wheres, characters = [], [], 0
    if samples:
        yield from to_documents(samples, tokenizer, wheres)


def prompts_of(path: str | Path) -> Iterator[str]:
    """Yields the text before the first trained part of each sample that has one, such as a prompt, in the file's order.

    Under `Tokenizer.encode` it gives the very ids with which the sample's Document begins.
    """
    for number, sample in read_jsonl(path):
        first = to_segments(sample, f"{path}:{number}")[0]
        if not first.trained:
            yield first.text


def _size(value: Any) -> int:
    """The number of characters in a sample's strings, how deep they may lie."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, items))


__all__ = ["FORMATS", "prompts_of", "read_documents", "read_jsonl", "to_document", "to_documents", "to_segments"]
