"""Chat: conversations as ids and what of them is trained, by the tokenizer's own template, else by a plain one.

The plain template:

    ### System:
    You are terse.

    ### User:
    What is 2 + 2?

    ### Assistant:
    4</s>

    ### User:
    …

Each turn is its header line, its content as it is, and, after an assistant's, EOS; a blank line stands between turns.
EOS is the only control token. Contents and headers are encoded as plain text, so a control token written in a content
stays text; a content that spells a header is not told from one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from minitune.arguments import short
from minitune.data.conversations import REASONING, is_trained, says_nothing
from minitune.data.mask import trained_spans
from minitune.data.segments import Flagged, Segment, encode_segments
from minitune.data.spans import encode_rendered
from minitune.data.template import ChatTemplate, Conversation
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

HEADERS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
BETWEEN = "\n\n"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles of a message. Which of them a template writes is the template's to say."""
FIELDS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", *REASONING)
_CHUNK = 256


def check_messages(messages: Any, where: str, tools: Any = None) -> None:
    """InputError unless `messages` is a conversation that may be trained on, and `tools` a list of JSON objects or
    None.

    A message has a role of `ROLES` and content: text, or a list of {"type": "text", "text"}. An assistant's may have
    tool_calls, and then no content; reasoning_content (or thinking, reasoning); and weight, 0 or 1. One that says
    nothing is refused unless its weight is 0. Other fields must be null, since one that is not read would change what
    is trained ("wieght").
    """
    _check(messages, where, tools)
    for place, message in enumerate(messages):
        if says_nothing(message):
            raise InputError(f"{where}: messages[{place}].content is empty; an assistant's turn must say something, be "
                             "left out, or have weight 0")


def _check(messages: Any, where: str, tools: Any = None) -> None:
    accepted = 'a list of {"role": "system" | "user" | "assistant" | "tool", "content": text}'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: messages is {short(messages)}; it must be {accepted}")
    for place, message in enumerate(messages):
        name = f"{where}: messages[{place}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{name} is {short(message)}; messages must be {accepted}")
        unknown = [key for key, value in message.items() if key not in FIELDS and value is not None]
        if unknown:
            raise InputError(f"{name} has the field {short(unknown[0])}, which is not read; accepted: "
                             f"{', '.join(FIELDS)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{name}.role is {short(role)}; accepted: {', '.join(ROLES)}")
        _check_content(message, name)
        weight = message.get("weight")
        if weight not in (None, 0, 1) or isinstance(weight, bool):
            raise InputError(f"{name}.weight is {short(weight)}; it must be 0 (not trained) or 1")
        if weight and role != "assistant":
            raise InputError(f"{name}.weight is 1, but only an assistant's turns are trained; remove it")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise InputError(f"{name}.tool_calls is {short(calls)}; it must be a list of JSON objects")
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"{where}: tools is {short(tools)}; it must be a list of JSON objects")


def _check_content(message: Mapping[str, Any], name: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"{name}.content holds {short(part)}; only text is read: a string, or a list of "
                                 '{"type": "text", "text": …}')
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f"{name}.content is {short(content)}; it must be a string")
    for field in REASONING:
        if not isinstance(message.get(field, ""), str | None):
            raise InputError(f"{name}.{field} is {short(message[field])}; it must be a string")


def encode_conversations(conversations: Sequence[Conversation], tokenizer: Tokenizer, mask: bool = True
                         ) -> list[Flagged]:
    """The (ids, trained) of many conversations, each (messages, tools or None, where). Without ``mask`` they are
    prompts: the beginning of an answer follows, and nothing is trained.

    Trained are the assistant's turns, with the token that ends them, except those with "weight": 0. Where the template
    writes no such token, EOS is put behind a conversation that ends with a trained turn. The ids are transformers'
    `apply_chat_template`'s, but for a control token that a message spells, which stays text, and a call's arguments
    that are JSON text, which a template that writes JSON gets as the object. Rendering and tokenising go on side by
    side. The messages are those of a Sample, or were checked. Raises InputError that names the conversation: see
    `trained_spans`.
    """
    places: dict[ChatTemplate | None, list[int]] = {}       # those with tools may have a template of their own
    for place, conversation in enumerate(conversations):
        places.setdefault(tokenizer.template_for(conversation[1]), []).append(place)
    found: dict[int, Flagged] = {}
    for template, which in places.items():
        part = [conversations[place] for place in which]
        encoded = (_encode_plain(part, tokenizer, mask) if template is None
                   else _encode_by(template, part, tokenizer, mask))
        found.update(zip(which, encoded, strict=True))
    return [found[place] for place in range(len(conversations))]


def encode_chat(messages: Any, tokenizer: Tokenizer, tools: Any = None, add_generation_prompt: bool = False) -> Flagged:
    """`Tokenizer.encode_chat`. An empty answer is no error here: a model may have given one."""
    _check(messages, "chat", tools)
    return encode_conversations([(messages, tools, "chat")], tokenizer, mask=not add_generation_prompt)[0]


def render_chat(messages: Any, tokenizer: Tokenizer, tools: Any = None, add_generation_prompt: bool = False) -> str:
    """`Tokenizer.render_chat`."""
    _check(messages, "chat", tools)
    template = tokenizer.template_for(tools)
    if template is None:
        _check_plain(messages, tools, "chat")
        segments = _plain_segments(messages, not add_generation_prompt)
        eos = tokenizer.token(tokenizer.require_eos())
        return "".join(segment.text + (eos if segment.ends else "") for segment in segments)
    chat = next(template.render([(messages, tools, "chat")], add_generation_prompt))
    return chat.read(chat.text)


def _encode_by(template: ChatTemplate, conversations: Sequence[Conversation], tokenizer: Tokenizer, mask: bool
               ) -> Iterator[Flagged]:
    rendered = template.render(conversations, prompt=not mask, mask=mask)
    while chunk := list(islice(rendered, _CHUNK)):
        wanted = mask and (template.marks_answers or any(chat.marks for chat in chunk))
        stop = tokenizer.turn_end if wanted else None
        spans = [trained_spans(chat, template, stop) if mask else ([], False) for chat in chunk]
        encoded = encode_rendered(tokenizer, chunk, [span for span, _ in spans])
        for chat, (ids, trained, lead), (_, ends) in zip(chunk, encoded, spans, strict=True):
            if lead.strip():
                raise InputError(f"{chat.where}: the tokenizer joins {chat.read(lead)[-20:]!r}, the end of what the "
                                 f"chat template {template.name} writes before an answer, with the answer's first "
                                 "characters into one token; begin the answer with a blank")
            yield ([*ids, tokenizer.require_eos()], [*trained, True]) if ends else (ids, trained)


# -- the plain template

def _plain_segments(messages: Sequence[Mapping[str, Any]], mask: bool) -> list[Segment]:
    """The turns as the plain template writes them: an assistant's content, with EOS, is a segment, and so is all that
    stands between two. Without ``mask`` none is trained, and the header of an assistant's turn to come ends them.
    """
    segments: list[Segment] = []
    pending = ""
    for place, message in enumerate(messages):
        pending += (BETWEEN if place else "") + HEADERS[message["role"]]
        if message["role"] != "assistant":
            pending += _text(message)
            continue
        segments += [Segment(pending, False), Segment(_text(message), mask and is_trained(message), ends=True)]
        pending = ""
    if not mask:
        pending += (BETWEEN if messages else "") + HEADERS["assistant"]
    if pending:
        segments.append(Segment(pending, False))
    return segments


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_plain(messages: Sequence[Mapping[str, Any]], tools: Any, where: str) -> None:
    advice = "the tokenizer has no chat template, and minitune's plain one"
    if tools:
        raise InputError(f"{where}: has tools, but {advice} cannot write them; use a checkpoint with a template")
    for place, message in enumerate(messages):
        name = f"{where}: messages[{place}]"
        if message["role"] not in HEADERS:
            raise InputError(f"{name}.role is {message['role']!r}, but {advice} writes only {', '.join(HEADERS)}")
        if message["role"] == "system" and place:
            raise InputError(f"{name}: a system turn must be the first one")
        for field in ("tool_calls", *REASONING):
            if message.get(field):
                raise InputError(f"{name} has {field}, but {advice} writes only content")


def _encode_plain(conversations: Sequence[Conversation], tokenizer: Tokenizer, mask: bool) -> list[Flagged]:
    for messages, tools, where in conversations:
        _check_plain(messages, tools, where)
    return encode_segments([_plain_segments(messages, mask) for messages, _, _ in conversations], tokenizer)


__all__ = ["check_messages", "encode_chat", "encode_conversations", "render_chat"]
