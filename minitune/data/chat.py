"""The plain chat template: how turns of a conversation become text where no template of the model's own is used.

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

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minitune.config import short
from minitune.data.document import Segment, encode_samples
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

HEADERS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
BETWEEN = "\n\n"


def check_messages(messages: Any, where: str) -> None:
    """InputError unless `messages` is a list of {"role", "content"}: known roles, text, a system turn only first."""
    accepted = 'a list of {"role": "system" | "user" | "assistant", "content": text}'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: messages is {short(messages)}; it must be {accepted}")
    for place, message in enumerate(messages):
        name = f"{where}: messages[{place}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{name} is {short(message)}; messages must be {accepted}")
        unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
        if unknown:
            raise InputError(f"{name} has the field {unknown[0]!r}, which is not read; accepted: role, content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in HEADERS:
            raise InputError(f"{name}.role is {short(role)}; accepted: {', '.join(HEADERS)}")
        if role == "system" and place:
            raise InputError(f"{name}: a system turn must be the first one")
        if not isinstance(content, str):
            raise InputError(f"{name}.content is {short(content)}; it must be a string")
        if role == "assistant" and not content:
            raise InputError(f"{name}.content is empty; an assistant's turn must say something, or be left out")


def render_prompt(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[Segment]:
    """The turns as segments: assistant contents trained, all between them not.

    ``add_generation_prompt`` ends with the header of an assistant's turn to come.
    """
    segments: list[Segment] = []
    pending = ""
    for place, message in enumerate(messages):
        pending += (BETWEEN if place else "") + HEADERS[message["role"]]
        if message["role"] != "assistant":
            pending += message["content"]
            continue
        segments += [Segment(pending, False, bool(segments)), Segment(message["content"], True, True)]
        pending = ""
    if add_generation_prompt:
        pending += (BETWEEN if messages else "") + HEADERS["assistant"]
    if pending:
        segments.append(Segment(pending, False, bool(segments)))
    return segments


def encode_chat_plain(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer,
                      add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """(ids, trained) of a conversation under the plain template; with ``add_generation_prompt`` the ids of a prompt.

    A prompt's ids are a prefix of the ids of the same conversation with its answer. Raises InputError for messages that
    are no conversation.
    """
    check_messages(messages, "chat")
    return encode_samples([render_prompt(messages, add_generation_prompt)], tokenizer)[0]


def announce_plain_template(tokenizer: Tokenizer) -> None:
    """Warns that a tokenizer's own chat template is not used."""
    if tokenizer.chat_template is not None:
        warnings.warn(f"{tokenizer.folder}: its own chat template is not used; messages are rendered by minitune's "
                      "plain template (### User: …), in training and in chat alike", stacklevel=3)


__all__ = ["HEADERS", "announce_plain_template", "check_messages", "encode_chat_plain", "render_prompt"]
