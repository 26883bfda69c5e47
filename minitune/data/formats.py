"""The sample formats: a row in any of them becomes a Sample, which says what of it is trained and what is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minitune.arguments import is_number, short
from minitune.data.conversations import check_trained, is_trained, text_of, to_messages, to_tools, untrained
from minitune.data.fields import FORMATS, check_field_map, recognise
from minitune.data.rows import read_rows
from minitune.data.segments import Segment
from minitune.errors import InputError

Messages = list[dict[str, Any]]


class Unused(NamedTuple):
    """Text of a row that is not used, and why: its tokens count as dropped."""

    reason: str
    text: str


class Sample(NamedTuple):
    """One row, whatever its format: segments of text, or messages for a chat template, or neither (all is unused).

    ``messages`` are OpenAI's: {"role", "content", …}; assistant turns are trained, except those with "weight": 0.
    ``tools`` belong to them. ``weight`` (positive, None: 1) multiplies the sample's loss. ``where`` is "file:line",
    ``kind`` a key of `minitune.data.fields.FORMATS`. ``rejected``: of a pair, the same prompt with the other answer.
    """

    where: str
    kind: str
    segments: list[Segment] | None
    messages: Messages | None
    tools: list[Any] | None
    weight: float | None
    unused: Unused | None = None
    rejected: Sample | None = None


@dataclass(frozen=True)
class Prompt:
    """What stands before the first trained part of a sample: ``text``, or ``messages`` with their ``tools``."""

    text: str | None
    messages: Messages | None
    tools: list[Any] | None = None


class _Content(NamedTuple):
    """What a format's reader finds in a row; ``rejected`` reads the rest of a preference as a sample, too."""

    segments: list[Segment] | None = None
    messages: Messages | None = None
    tools: list[Any] | None = None
    unused: Unused | None = None
    rejected: Callable[[], _Content] | None = None


def to_sample(row: Mapping[str, Any], where: str, field_map: Mapping[str, str] | None = None,
              pairs: bool = False) -> Sample:
    """The Sample of one row, in whichever of these formats its fields say (`minitune.data.fields`):

    - {"text"}: all of it is trained.
    - {"prompt", "completion"}: the completion is. Both are text; or lists of messages (or one of each), as TRL has it.
    - Alpaca's {"instruction", "input", "output"}, input or "system" may lack: a chat. The user says the instruction, a
      blank line and the input, the assistant the output, so that the model's own template applies; Stanford's text
      "Below is an instruction…" is not used (the peers differ on it; write it as prompt and completion to have it), and
      neither is the field "text" in which his published file has the same sample rendered.
    - OpenAI's {"messages", "tools"} and ShareGPT's {"conversations", "system", "tools"}: the assistant's turns are
      trained, except those with "weight": 0.
    - Gradient's {"inputs", "multiplier"}: text, all of it trained, or a list of {"value", "trainable",
      "parse_special_tokens"}; the multiplier is the sample's weight.
    - {"prompt", "chosen", "rejected"}, or chosen and rejected conversations that begin alike; OpenAI's {"input":
      {"messages", "tools"}, "preferred_output", "non_preferred_output"}: chosen is trained, rejected is unused.
    - {"prompt", "completion", "label"}: trained where the label is true; else all of it is unused.

    EOS is put, trained, behind a text, a completion, an assistant's turn. Gradient trains exactly what is given; here
    EOS follows the last segment that is not empty, if that is trained and does not end with EOS itself, since a model
    that never sees the end of its answers never stops; segments before it get none.

    Any row may have "weight", a positive number that multiplies its loss. `field_map`, which was checked, and the rule
    on other fields: see `recognise`. With `pairs` a row must be a preference, and its rejected answer is read as the
    chosen one is; a pair of equal answers, which prefers nothing, is unused. Raises InputError that begins with `where`
    and names the field and what is accepted.
    """
    kind, fields = recognise(row, where, field_map)
    weight = _weight(fields, where)
    found = _READERS[kind](fields, where)
    if found.segments is not None:
        for name in ("tools", "functions"):
            if fields.get(name):
                raise InputError(f"{where}: {name} belong to a conversation, but the sample is plain text; write its "
                                 "parts as lists of messages, or remove them")
    if pairs:
        return _paired(found, where, kind, weight)
    return Sample(where, kind, found.segments, found.messages, found.tools, weight, found.unused)


def _paired(chosen: _Content, where: str, kind: str, weight: float | None) -> Sample:
    """The Sample of a preference, with that of its rejected answer."""
    if chosen.rejected is None:
        raise InputError(f"{where}: is a sample of the format {kind}, which has no rejected answer to compare with; "
                         f"give {' or '.join(', '.join(FORMATS[each].required) for each in _PREFERENCES)}")
    rejected = chosen.rejected()
    if (chosen.segments is None) != (rejected.segments is None):
        raise InputError(f"{where}: of chosen and rejected one is text and the other messages; write both alike")
    if chosen[:2] == rejected[:2]:
        said = "".join(each.text for each in chosen.segments or ()) + text_of(chosen.messages or ())
        return Sample(where, kind, None, None, None, weight, Unused(SAME, said))
    return Sample(where, kind, *chosen[:3], weight, rejected=Sample(where, kind, *rejected[:3], weight))


def to_samples(rows: Iterable[tuple[str, dict[str, Any]]], field_map: Mapping[str, str] | None = None,
               pairs: bool = False) -> Iterator[Sample]:
    """Yields the Sample of each (where, row), such as `read_rows` gives them. See `to_sample`. InputError also for a
    field map that is none."""
    if field_map:
        check_field_map(field_map)
    for where, row in rows:
        yield to_sample(row, where, field_map, pairs)


def prompts_of(path: str | Path, field_map: Mapping[str, str] | None = None) -> Iterator[Prompt]:
    """Yields what stands before the first trained part of each sample that has something there, in the file's order.

    A text, under `Tokenizer.encode`, gives the very ids with which its document begins, if it is one segment; the
    messages do under `encode_chat` with a generation prompt.
    """
    for sample in to_samples(read_rows(path), field_map):
        if sample.segments is not None:
            first = next((i for i, segment in enumerate(sample.segments) if segment.trained), 0)
            text = "".join(segment.text for segment in sample.segments[:first])
            if text:
                yield Prompt(text, None)
        elif sample.messages is not None:
            first = next((i for i, message in enumerate(sample.messages) if is_trained(message)), 0)
            if first:
                yield Prompt(None, sample.messages[:first], sample.tools)


def _weight(fields: Mapping[str, Any], where: str) -> float | None:
    given = [name for name in ("weight", "multiplier") if name in fields]
    if len(given) > 1:
        raise InputError(f"{where}: weight and multiplier are given, which mean the same; keep one")
    if not given:
        return None
    weight = fields[given[0]]
    if not is_number(weight) or not 1e-30 <= weight < 1e30:
        raise InputError(f"{where}: {given[0]} is {short(weight)}; it must be a positive number below 1e30, at least "
                         "1e-30")
    return float(weight)


def _string(fields: Mapping[str, Any], name: str, where: str, *, empty: bool = True) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {short(value)}; it must be a string")
    if not value and not empty:
        raise InputError(f"{where}: {name} is empty, so there is nothing to train on; write some or remove the sample")
    return value


def _text(fields: Mapping[str, Any], where: str) -> _Content:
    return _Content([Segment(_string(fields, "text", where, empty=False), True, ends=True)])


def _pair(fields: Mapping[str, Any], where: str, answer: str = "completion") -> _Content:
    """A prompt and the answer to it, each text or messages."""
    if not any(isinstance(fields[name], list) for name in ("prompt", answer)):
        prompt, said = _string(fields, "prompt", where), _string(fields, answer, where, empty=False)
        if not prompt:
            return _Content([Segment(said, True, ends=True)])
        return _Content([Segment(prompt, False), Segment(said, True, ends=True)])
    asked = untrained(_turns(fields["prompt"], where, "prompt", "user"), where, "prompt")
    answers = _turns(fields[answer], where, answer, "assistant", trained=True)
    check_trained(answers, where, answer)
    return _Content(messages=asked + answers, tools=to_tools(fields, where))


def _turns(value: Any, where: str, name: str, role: str, *, trained: bool = False) -> Messages:
    """Messages as they are, a text as one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _string({name: value}, name, where, empty=not trained)}]
    return to_messages(value, where, name, trained=trained)


def _alpaca(fields: Mapping[str, Any], where: str) -> _Content:
    parts = [_string(fields, "instruction", where), _string(fields, "input", where)]
    if not any(parts):
        raise InputError(f"{where}: instruction is empty, so nothing is asked; write one or remove the sample")
    answer = _string(fields, "output", where, empty=False)
    return _Content(messages=[*_system(fields, where), {"role": "user", "content": "\n\n".join(filter(None, parts))},
                              {"role": "assistant", "content": answer}])


def _system(fields: Mapping[str, Any], where: str) -> Messages:
    text = _string(fields, "system", where)
    return [{"role": "system", "content": text}] if text else []


def _chat(fields: Mapping[str, Any], where: str, name: str = "messages") -> _Content:
    messages = to_messages(fields[name], where, name)
    check_trained(messages, where, name)
    system = _system(fields, where)
    if system and messages[0]["role"] == "system":
        raise InputError(f"{where}: system is given beside a system turn in {name}; keep one")
    return _Content(messages=system + messages, tools=to_tools(fields, where))


def _gradient(fields: Mapping[str, Any], where: str) -> _Content:
    inputs = fields["inputs"]
    if isinstance(inputs, str):
        return _Content([Segment(_string(fields, "inputs", where, empty=False), True, ends=True)])
    if not isinstance(inputs, list) or not inputs:
        raise InputError(f"{where}: inputs is {short(inputs)}; it must be a string, or a list of "
                         '{"value", "trainable", "parse_special_tokens"}')
    segments: list[Segment] = []
    for place, part in enumerate(inputs):
        name = f"{where}: inputs[{place}]"
        if not isinstance(part, Mapping):
            raise InputError(f'{name} is {short(part)}; it must be {{"value", "trainable", "parse_special_tokens"}}')
        unknown = set(part) - {"value", "trainable", "parse_special_tokens"}
        if unknown:
            raise InputError(f"{name} has the field {short(min(map(str, unknown)))}, which is not read; accepted: "
                             "value, trainable, parse_special_tokens")
        parse = part.get("parse_special_tokens")
        parse = False if parse is None else parse
        for field, flag in (("trainable", part.get("trainable")), ("parse_special_tokens", parse)):
            if not isinstance(flag, bool):
                raise InputError(f"{name}.{field} is {short(flag)}; it must be true or false")
        value, trainable = part.get("value"), bool(part["trainable"])
        if not isinstance(value, str) or (trainable and not value):
            raise InputError(f"{name}.value is {short(value)}; it must be a string"
                             + (", and not empty where it is trained" if trainable else ""))
        if value:
            segments.append(Segment(value, trainable, parse_special=parse))
    if not segments:
        raise InputError(f"{where}: inputs holds no text; write some or remove the sample")
    segments[-1] = segments[-1]._replace(ends=segments[-1].trained)
    return _Content(segments)


def _preference(fields: Mapping[str, Any], where: str) -> _Content:
    """Chosen answers the prompt, unless it is a whole conversation: then prompt is what it and rejected begin with."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    sides = {name: value if isinstance(value, str) else to_messages(value, where, name, trained=False)
             for name, value in (("chosen", chosen), ("rejected", rejected))}
    texts = {name: side if isinstance(side, str) else text_of(side) for name, side in sides.items()}
    if isinstance(sides["chosen"], str) or sides["chosen"][0]["role"] == "assistant":
        if "prompt" not in fields:
            raise InputError(f"{where}: the field 'prompt' is missing beside 'chosen', which is no whole conversation; "
                             "write the question as prompt")
        return _pair(fields, where, "chosen")._replace(unused=Unused("rejected answer", texts["rejected"]),
                                                       rejected=partial(_pair, fields, where, "rejected"))
    messages, others = sides["chosen"], sides["rejected"]
    shared = 0
    if not isinstance(others, str):
        pairs = zip(messages, others, strict=False)
        shared = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(messages), len(others)))
    while shared and all(message["role"] != "assistant" for message in messages[shared:]):
        shared -= 1     # both answers are the same, or what follows them differs: the last answer is the one chosen
    differing = [side[shared] for side in (messages, others) if not isinstance(side, str) and len(side) > shared]
    alike = shared > 0 and all(message["role"] == "assistant" for message in differing)
    asked = untrained(messages[:shared], where, "chosen")
    prompt = fields.get("prompt")
    said = to_messages(prompt, where, "prompt", trained=False)[-1]["content"] if isinstance(prompt, list) else prompt
    if prompt is not None and not any(message["content"] == said for message in asked):
        raise InputError(f"{where}: prompt is {short(prompt)}, but chosen is a whole conversation that does not begin "
                         "with it as rejected does; write the answer alone as chosen, or remove prompt")
    check_trained(to_messages(messages[shared:], where, f"chosen[{shared}:]"), where, "chosen")
    answers, tools = others if isinstance(others, str) else others[shared:], to_tools(fields, where)
    return _Content(messages=asked + messages[shared:], tools=tools,
                    unused=Unused("rejected answer", answers if isinstance(answers, str) else text_of(answers)),
                    rejected=partial(_rejected, asked, answers, tools, where, "rejected", alike))


def _rejected(asked: Messages, answers: Messages | str, tools: list[Any] | None, where: str, name: str,
              alike: bool = True) -> _Content:
    """The prompt with the messages that were rejected. ``alike``: those that were chosen answer the same prompt."""
    if isinstance(answers, str):
        raise InputError(f"{where}: {name} is a text, and chosen a conversation; write both alike")
    if not alike:
        raise InputError(f"{where}: chosen and {name} do not begin alike, so they do not answer the same prompt; give "
                         "both the same turns before their answers")
    check_trained(to_messages(answers, where, name) if answers else (), where, name)
    return _Content(messages=asked + answers, tools=tools)


def _openai_preference(fields: Mapping[str, Any], where: str) -> _Content:
    given = fields["input"]
    if not isinstance(given, Mapping) or given.get("messages") is None:
        raise InputError(f'{where}: input is {short(given)}; it must be {{"messages": […], "tools": […]}}')
    name = "input.messages"
    asked = untrained(to_messages(given["messages"], where, name, trained=False), where, name)
    chosen = to_messages(fields["preferred_output"], where, "preferred_output")
    check_trained(chosen, where, "preferred_output")
    rejected = to_messages(fields["non_preferred_output"], where, "non_preferred_output", trained=False)
    tools = to_tools({name: value for name, value in given.items() if value is not None}, f"{where}: input")
    return _Content(messages=asked + chosen, tools=tools, unused=Unused("rejected answer", text_of(rejected)),
                    rejected=partial(_rejected, asked, rejected, tools, where, "non_preferred_output"))


def _kto(fields: Mapping[str, Any], where: str) -> _Content:
    label = fields["label"]
    if not isinstance(label, bool):
        raise InputError(f"{where}: label is {short(label)}; it must be true (train it) or false (do not)")
    if label:
        return _pair(fields, where)
    turns = _turns(fields["prompt"], where, "prompt", "user")
    turns += _turns(fields["completion"], where, "completion", "assistant")
    return _Content(unused=Unused("label is false", text_of(turns)))


_READERS: dict[str, Callable[[Mapping[str, Any], str], _Content]] = {
    "text": _text, "prompt/completion": _pair, "alpaca": _alpaca, "openai chat": _chat,
    "sharegpt": lambda fields, where: _chat(fields, where, "conversations"), "gradient": _gradient,
    "preference": _preference, "openai preference": _openai_preference, "kto": _kto,
}

SAME = "chosen and rejected are the same"
"""Why a pair of answers is unused that prefers nothing."""
_PREFERENCES = ("preference", "openai preference")

__all__ = ["Prompt", "Sample", "Unused", "prompts_of", "to_sample", "to_samples"]
