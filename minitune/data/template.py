"""ChatTemplate: a conversation as the text that a checkpoint's own chat template makes of it, and who says what."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from minitune.arguments import short
from minitune.data.conversations import REASONING, is_trained
from minitune.data.jsonl import decode_value
from minitune.data.template_process import PROCESS
from minitune.errors import InputError

Conversation = tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None, str]
"""(messages, tools, where): ``where`` names it in errors, as "file:line"."""

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
"""What a template is given from the conversation and the tokenizer: no settings of the user's."""
_SURROGATE = re.compile("[\\ud800-\\udfff]")
MAX_SPELLED = 1000
"""Different control strings that one conversation may spell: there are marks for so many."""
_ARGUMENTS = '{"k": "v"}'
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": _ARGUMENTS}}]}]
"""A call as OpenAI's files have it: its arguments are JSON text."""
_CHUNK = 128
"""Conversations that the renderer is given at once; meanwhile those before them are tokenised."""


@dataclass
class Rendered:
    """A conversation in the template's words.

    In ``text``, and in ``messages`` as the template was given them, each control string that a message spells is one
    lone surrogate, so that what the template writes itself can be told from it; ``spelled`` maps them back. ``spans``
    are the [start, end) of what {% generation %} wraps. ``cuts`` answers, for each of ``trained`` (indices of
    messages), where in the text its turn begins and ends: a place, -1 (its beginning, rendered alone, is not how the
    text begins), or what the template refused it with. ``marks``: for those where one of the two is no place, where
    (first character, end of the last, first character of the next message) what it says stands, as far as is certain.
    ``absent``: which of the messages that are no assistant's the template does not write; None where that is uncertain.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str
    trained: list[int]
    spelled: dict[str, str] = field(default_factory=dict)
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    cuts: list[tuple[int | str, int | str]] = field(default_factory=list)
    marks: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    absent: list[int] | None = None

    def read(self, text: str) -> str:
        """`text`, a part of this one's, with the control strings that messages spell put back."""
        for mark, spelling in self.spelled.items():
            text = text.replace(mark, spelling)
        return text


def checked_kwargs(given: Any, sources: Iterable[str]) -> dict[str, Any]:
    """A copy of `given`, values for names that one of the templates `sources` reads, as {"enable_thinking": False}.
    InputError for what is no such table; a name that none reads would change nothing, unsaid."""
    check_table(given)
    templates = tuple(sources)
    known = names_read(templates) if given else frozenset()
    found = {}
    for name, value in given.items():
        if name in _GIVEN:
            raise InputError(f"chat_template_kwargs: {name} is no setting, it comes from the conversation or the "
                             "tokenizer; leave it out")
        if not templates:
            raise InputError(f"chat_template_kwargs: has {short(name)}, but the tokenizer has no chat template; leave "
                             "it out, or put a chat_template.jinja into the model's folder")
        if name not in known:
            close = get_close_matches(name[:40], sorted(known), n=1)
            raise InputError(f"chat_template_kwargs: the chat template does not read {short(name)}"
                             + (f"; did you mean {close[0]!r}?" if close else "; leave it out"))
        try:
            found[name] = decode_value(json.dumps(value, allow_nan=False), 0, name)[0]
        except (TypeError, ValueError, RecursionError, InputError):
            raise InputError(f"chat_template_kwargs: {name} is {short(value)}; it must be JSON: true, false, null, a "
                             "number, a text, a list or a table of these") from None
    return found


def check_table(given: Any, owner: str | None = None) -> None:
    """InputError, of `owner`, unless `given` has the form of chat_template_kwargs."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"{owner}: " * (owner is not None) + f"chat_template_kwargs is {short(given)}; give a table "
                         'such as {"enable_thinking": False}')


@functools.lru_cache(maxsize=8)
def names_read(sources: tuple[str, ...]) -> frozenset[str]:
    """What the templates `sources` read beside what is given to them, and perhaps some of what they set themselves.
    InputError for one that cannot be parsed, or not in bounded time and memory."""
    found: set[str] = set()
    for source in sources:
        (answer,) = PROCESS.render(source, {}, datetime.now(), [b'{"names": true}'])
        if "error" in answer:
            raise InputError(f"chat_template_kwargs: the chat template cannot be read: {answer['error']}")
        found.update(answer["names"])
    return frozenset(found.difference(_GIVEN))


class ChatTemplate:
    """A chat template, as Jinja source, of a tokenizer whose control tokens are spelled ``control``.

    ``name`` stands in errors ("folder/chat_template.jinja"). ``variables``: what the template sees beside messages,
    tools and add_generation_prompt, such as bos_token, all of it JSON. Jinja is set up as in transformers, and each
    conversation is rendered in bounded time and memory in a process apart (`minitune.data.template_child`). A template
    that calls strftime_now writes what `clock` tells, as in transformers: what is trained on then depends on the day.
    """

    def __init__(self, name: str, source: str, variables: Mapping[str, Any], control: Sequence[str],
                 clock: Callable[[], datetime] = datetime.now) -> None:
        self.name, self.source, self.variables, self.clock = name, source, variables, clock
        self.marks_answers = _GENERATION.search(_COMMENT.sub("", source)) is not None
        self.control = tuple(sorted(set(control) - {""}, key=len, reverse=True))
        self._control = re.compile("|".join(map(re.escape, self.control)) or "(?!)")

    def render(self, conversations: Sequence[Conversation], prompt: bool = False, mask: bool = False
               ) -> Iterator[Rendered]:
        """Renders many conversations in their order, some ahead of the caller.

        ``prompt``: add_generation_prompt. ``mask``: find out what is trained. Raises InputError that names the
        conversation and the template where the template refuses it or takes too much.
        """
        chunks = [conversations[i:i + _CHUNK] for i in range(0, len(conversations), _CHUNK)]
        if len(chunks) == 1:
            yield from self._render_chunk(chunks[0], prompt, mask)
            return
        with ThreadPoolExecutor(1) as ahead:
            futures = [ahead.submit(self._render_chunk, chunk, prompt, mask) for chunk in chunks]
            try:
                for future in futures:
                    yield from future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _render_chunk(self, conversations: Sequence[Conversation], prompt: bool, mask: bool) -> list[Rendered]:
        prepared = [self._prepare(*conversation, mask) for conversation in conversations]
        answers = PROCESS.render(self.source, self.variables, self.clock(),
                                 [self._request(each, prompt, mask) for each in prepared])
        for each, answer in zip(prepared, answers, strict=False):
            if "error" in answer:
                raise InputError(f"{each.where}: the chat template {self.name} does not render this conversation: "
                                 f"{each.read(answer['error'])}")
            each.text, each.spans = answer["text"], [(start, end) for start, end in answer["spans"]]
            if set(_SURROGATE.findall(each.text)).difference(each.spelled):
                raise InputError(f"{each.where}: the chat template {self.name} writes a lone surrogate, which is no "
                                 "character; correct it")
            each.absent = answer["absent"]
            each.marks = {number: (first, last, bound) for number, first, last, bound in answer["marks"]}
            cuts = iter(answer["cuts"])
            if mask and not self.marks_answers:
                last = len(each.messages)
                each.cuts = [(next(cuts), next(cuts) if i + 1 < last else len(each.text)) for i in each.trained]
        return prepared

    def _prepare(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, where: str, mask: bool
                 ) -> Rendered:
        """The messages as the template is to see them: no nulls, no weight, content as text, control strings hidden."""
        trained = [i for i, message in enumerate(messages) if mask and is_trained(message)]
        given = Rendered([_plain(message) for message in messages], list(tools) if tools else None, where, trained)
        if any(isinstance(arguments, str) for message in given.messages for arguments in _arguments(message)) \
                and self.quotes_arguments:
            given.messages = [_with_objects(message) for message in given.messages]
        try:
            written = json.dumps([given.messages, given.tools], ensure_ascii=False)
            written.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds the lone surrogate {error.object[error.start]!r}, which is no character; "
                             "repair the text's encoding") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: messages and tools must be JSON: {short(str(error))}") from error
        if self._control.search(written) or any(set(name) & set('"\\\n\t') for name in self.control):
            marks: dict[str, str] = {}
            given.messages, given.tools = self._hide(given.messages, marks), self._hide(given.tools, marks)
            if len(marks) > MAX_SPELLED:
                raise InputError(f"{where}: spells {len(marks):,} different control tokens; at most "
                                 f"{MAX_SPELLED:,} can be told from the chat template's own; split the conversation")
            given.spelled = {mark: spelling for spelling, mark in marks.items()}
        return given

    @functools.cached_property
    def quotes_arguments(self) -> bool:
        """Whether it writes a call's arguments as JSON, and so quotes those that are JSON text already, as they are in
        OpenAI's files; then it is given the objects that these texts hold."""
        request = {"messages": _PROBE, "tools": None, "prompt": False, "cuts": [], "seen": []}
        (answer,) = PROCESS.render(self.source, self.variables, self.clock(), [json.dumps(request).encode()])
        text = answer.get("text", "")
        return _ARGUMENTS not in text and json.dumps(_ARGUMENTS) in text

    def _hide(self, value: Any, marks: dict[str, str]) -> Any:
        """`value` with each control string replaced by a lone surrogate of its own, which `marks` collects. Roles stay:
        they come from a fixed list."""
        if isinstance(value, str):
            return self._control.sub(lambda match: marks.setdefault(
                match[0], chr(0xDC00 + min(len(marks), MAX_SPELLED))), value)
        if isinstance(value, dict):
            return {key if key == "role" else self._hide(key, marks):
                    item if key == "role" else self._hide(item, marks) for key, item in value.items()}
        return [self._hide(item, marks) for item in value] if isinstance(value, list) else value

    def _request(self, each: Rendered, prompt: bool, mask: bool) -> bytes:
        cuts: list[tuple[int, bool]] = []
        for i in () if self.marks_answers else each.trained:
            cuts += [(i, True), (i + 1, False)] if i + 1 < len(each.messages) else [(i, True)]
        seen = [i for i, message in enumerate(each.messages) if mask and message["role"] != "assistant"]
        return json.dumps({"messages": each.messages, "tools": each.tools, "prompt": prompt, "cuts": cuts,
                           "seen": seen}).encode()


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: null fields are absent, reasoning has all its names."""
    plain = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(part["text"] for part in plain["content"])
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _arguments(message: Mapping[str, Any]) -> list[Any]:
    """The arguments of a message's calls."""
    calls = message.get("tool_calls") or ()
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    return [each["arguments"] for each in functions if isinstance(each, Mapping) and "arguments" in each]


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have objects as arguments, where these are the JSON text of one."""
    if not any(isinstance(arguments, str) for arguments in _arguments(message)):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        try:
            value, end = decode_value(arguments, 0, "") if isinstance(arguments, str) else (None, 0)
        except (InputError, json.JSONDecodeError):
            value, end = None, 0
        if isinstance(value, dict) and not arguments[end:].strip():
            function = function | {"arguments": value}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


__all__ = ["ChatTemplate", "Conversation", "Rendered"]
