"""Conversations as their many writers spell them, brought to one shape: OpenAI's messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from minitune.arguments import is_number, short
from minitune.data.jsonl import decode_value
from minitune.errors import InputError

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool", "function_call": "assistant",
}
"""Who speaks, as files write it -> as the messages have it."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The fields of a message in which an assistant's thoughts may stand."""

_SHAPE = '{"role": …, "content": text} or {"from": …, "value": text}'
_TEXTS = ("name", "tool_call_id", *REASONING)
_READ = ("role", "content", "from", "value", "weight", "tool_calls", "function_call", *_TEXTS)
_REFUSED = {
    "refusal": "write what it says as content", "audio": "only text is read", "images": "only text is read",
    "image": "only text is read", "prefix": "only whole turns are read",
    **dict.fromkeys(("train", "trainable", "training", "train_detail", "training_detail", "loss", "loss_mask",
                     "loss_weight", "mask", "masked", "is_trained"), "write weight, 0 or 1"),
}


def to_messages(turns: Any, where: str, name: str, *, trained: bool = True) -> list[dict[str, Any]]:
    """A list of turns as messages {"role", "content", …}, in OpenAI's shape.

    ``name`` is the field they stand in, for errors. A turn is {"role", "content"} or ShareGPT's {"from", "value"}, its
    speaker any of `ROLES`. Null counts as absent, except as the content of a turn with tool calls. Content is text, or
    a list of {"type": "text", "text"}, joined. Kept are weight (0 or 1, on assistant turns), name, tool_calls,
    tool_call_id, reasoning_content, reasoning, thinking; a legacy function_call becomes a tool call. Other fields of a
    turn are ignored, unless they look like a misspelling of one of these or would change what is learned. Raises
    InputError for everything else, and, where the turns are ``trained``, for an assistant's that says nothing.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise InputError(f"{where}: {name} is {short(turns)}; it must be a list of {_SHAPE}")
    messages = [_message(turn, f"{where}: {name}[{place}]") for place, turn in enumerate(turns)]
    for place, message in enumerate(messages if trained else ()):
        if says_nothing(message):
            raise InputError(f"{where}: {name}[{place}] says nothing; an assistant's turn must have some content or "
                             "tool calls, be left out, or have weight 0")
    return messages


def to_tools(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools of a sample: a list of objects, or one written as JSON; legacy functions become tools. None: none."""
    given = [name for name in ("tools", "functions") if name in fields]
    if len(given) > 1:
        raise InputError(f"{where}: tools and functions are given; keep one")
    if not given:
        return None
    name, tools = given[0], fields[given[0]]
    if isinstance(tools, str):
        tools = _json(tools, f"{where}: {name}") if tools.strip() else []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{where}: {name} is {short(tools)}; it must be a list of JSON objects, or one as JSON text")
    if name == "functions":
        tools = [{"type": "function", "function": function} for function in tools]
    return tools or None


def check_trained(messages: Sequence[Mapping[str, Any]], where: str, name: str) -> None:
    """InputError if no turn is an assistant's: nothing of the sample could be trained."""
    if all(message["role"] != "assistant" for message in messages):
        raise InputError(f"{where}: {name} has no assistant turn, so there is nothing to train on; add one")


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether it is an answer that is to be learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def says_nothing(message: Mapping[str, Any]) -> bool:
    """Whether it is trained, though it has neither content nor tool calls."""
    return is_trained(message) and not message.get("content") and not message.get("tool_calls")


def untrained(messages: Sequence[dict[str, Any]], where: str, name: str) -> list[dict[str, Any]]:
    """The messages of a prompt: its assistant turns are not trained. InputError if one says that it is."""
    for place, message in enumerate(messages):
        if message.get("weight"):
            raise InputError(f"{where}: {name}[{place}].weight is 1, but a prompt is not trained; move the turn, or "
                             "remove its weight")
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the messages say, tool calls as JSON, without any template."""
    parts: list[str] = []
    for message in messages:
        parts += [message[field] for field in (*REASONING, "content") if message.get(field)]
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=str))
    return "\n".join(parts)


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{name} is {short(turn)}; a turn must be {_SHAPE}")
    given = {field: value for field, value in turn.items() if value is not None}
    for field in given:
        if field not in _READ:
            _check_other(field, name)
    sharegpt = "from" in given or "value" in given
    if sharegpt and ("role" in given or "content" in given):
        raise InputError(f"{name} has from/value and role/content; keep one of both")
    speaker, said = ("from", "value") if sharegpt else ("role", "content")
    role = given.get(speaker)
    if not isinstance(role, str) or role not in ROLES:
        close = get_close_matches(role[:40].lower(), ROLES, n=1) if isinstance(role, str) else []
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"{name}.{speaker} is {short(role)}; {advice}accepted: {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[role]}
    calls = _tool_calls(given, name)
    if role == "function_call":     # ShareGPT's way: the value is the call, as JSON
        calls, content = _legacy_call(given.get(said), f"{name}.{said}"), None
    else:
        content = _content(given.get(said), f"{name}.{said}", optional=bool(calls) and ROLES[role] == "assistant")
    message["content"] = content
    for field in _TEXTS:
        if field in given:
            if not isinstance(given[field], str):
                raise InputError(f"{name}.{field} is {short(given[field])}; it must be a string")
            message[field] = given[field]
    if calls:
        if message["role"] != "assistant":
            raise InputError(f"{name} has tool calls, but its {speaker} is {role!r}; only an assistant calls tools")
        message["tool_calls"] = calls
    weight = _weight(given, name, message["role"])
    if weight is not None:
        message["weight"] = weight
    return message


def _check_other(field: Any, name: str) -> None:
    """Fields of a turn beside those that are read: harmless, or one error."""
    if field in _REFUSED:
        raise InputError(f"{name} has the field {field!r}, which is not read; {_REFUSED[field]}")
    close = _misspelt(field) if isinstance(field, str) and len(field) <= 40 else None
    if close:
        raise InputError(f"{name} has the unknown field {field!r}; did you mean {close!r}?")


@lru_cache(maxsize=1024)
def _misspelt(field: str) -> str | None:
    close = get_close_matches(field.lower(), _READ, n=1, cutoff=0.83)
    return close[0] if close else None


def _content(value: Any, name: str, optional: bool) -> str | None:
    if isinstance(value, str) or (value is None and optional):
        return value
    if not isinstance(value, list):
        none = ' (only an assistant that calls tools may say nothing; an empty turn is "")' if value is None else ""
        raise InputError(f"{name} is {short(value)}; it must be a string{none}")
    texts: list[str] = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise InputError(f"{name}[{place}] is of type {short(kind)}, and only text is read; remove it or the "
                             "sample")
        if kind is None or not isinstance(part.get("text"), str):
            raise InputError(f'{name}[{place}] is {short(part)}; it must be a string, or parts '
                             '{"type": "text", "text": …}')
        texts.append(part["text"])
    return "".join(texts)


def _weight(given: Mapping[str, Any], name: str, role: str) -> int | None:
    if "weight" not in given:
        return None
    weight = given["weight"]
    if not is_number(weight) or weight not in (0, 1):
        raise InputError(f"{name}.weight is {short(weight)}; a turn's weight is 0 (not trained) or 1 (trained); any "
                         "other belongs to the sample, beside the turns")
    if role != "assistant":
        if weight:
            raise InputError(f"{name}.weight is 1, but only an assistant's turns are trained; remove it")
        return None
    return int(weight)


def _tool_calls(given: Mapping[str, Any], name: str) -> list[Any] | None:
    calls = given.get("tool_calls")
    if "function_call" in given:
        if calls:
            raise InputError(f"{name} has tool_calls and function_call; keep one")
        return _legacy_call(given["function_call"], f"{name}.function_call")
    if calls is None:
        return None
    if isinstance(calls, str):
        calls = _json(calls, f"{name}.tool_calls") if calls.strip() else []
    good = isinstance(calls, list) and all(isinstance(call, Mapping) and _names_function(call) for call in calls)
    if not good:
        raise InputError(f'{name}.tool_calls is {short(calls)}; it must be a list of '
                         '{"type": "function", "function": {"name": …, "arguments": …}}')
    return calls or None


def _names_function(call: Mapping[str, Any]) -> bool:
    function = call.get("function", call)
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _legacy_call(value: Any, name: str) -> list[Any]:
    function = _json(value, name) if isinstance(value, str) else value
    functions = function if isinstance(function, list) else [function]
    if not functions or not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions):
        raise InputError(f'{name} is {short(value)}; it must be {{"name": …, "arguments": …}}')
    return [{"type": "function", "function": one} for one in functions]


def _json(text: str, name: str) -> Any:
    """The value that `text` spells as JSON, as strict as a file's."""
    body = text.strip(" \t\r\n")
    try:
        value, end = decode_value(body, 0, name)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is {short(text)}, which is not valid JSON: {error.msg.removesuffix(' at')} at "
                         f"column {error.colno}") from error
    if end < len(body):
        raise InputError(f"{name} is {short(text)}, which is not one JSON value")
    return value


__all__ = ["REASONING", "check_trained", "is_trained", "says_nothing", "text_of", "to_messages", "to_tools",
           "untrained"]
