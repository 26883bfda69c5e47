"""Which characters of a rendered conversation the model is to say, checked: nothing is trained or lost by accident."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minitune.data.conversations import REASONING
from minitune.data.template import ChatTemplate, Rendered
from minitune.errors import InputError

Spans = list[tuple[int, int]]


def trained_spans(chat: Rendered, template: ChatTemplate, stop: str | None) -> tuple[Spans, bool]:
    """([start, end) of each trained turn in ``chat.text``, whether EOS has yet to be put behind the text).

    A turn is what the assistant says, with the control token that the template ends it by: without it a model never
    learns to stop. It comes from {% generation %} where the template has that; else it is the difference between the
    text up to the turn, with the prompt of a generation, and the text that ends with it. Both are rendered for every
    turn and must be beginnings of the whole text. Where one is not (Qwen3 writes an empty thought into the last answer
    alone), marks around the content tell where it stands, and the turn is that with all up to the next ``stop``, the
    control string that ends a turn, where it is known.

    Raises InputError, naming the template and the message, where neither tells the turn, and where the template leaves
    out (part of) a message, the tools, or a call of one.
    """
    stop = stop if template.marks_answers or chat.marks else None
    spans = _from_generation(chat, template) if template.marks_answers else _from_cuts(chat, template, stop)
    check_written(chat, template, dict(zip(chat.trained, spans, strict=False)))
    found: Spans = []
    ends = False
    for start, end in spans:
        said = chat.text[start:end].rstrip()
        if said.endswith(template.control):
            end = start + len(said)
        elif stop and chat.text.startswith(stop, end):
            end += len(stop)
        elif not chat.text[end:].strip():
            ends, end = True, len(chat.text)
        found.append((start, end))
    return found, ends


def _from_generation(chat: Rendered, template: ChatTemplate) -> Spans:
    speakers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if chat.trained and not chat.spans:
        raise InputError(f"{chat.where}: the chat template {template.name} has {{% generation %}} but wraps nothing of "
                         f"this conversation in it, so messages[{chat.trained[0]}] would not be trained; correct it")
    if not chat.trained:
        return []
    if len(chat.spans) != len(speakers):
        raise InputError(f"{chat.where}: the chat template {template.name} marks {len(chat.spans)} parts as generated, "
                         f"but there are {len(speakers)} assistant turns, so what is trained cannot be told; let it "
                         "wrap each assistant's turn in {% generation %} once, or remove that from it")
    return [span for span, i in zip(chat.spans, speakers, strict=True) if i in set(chat.trained)]


def _from_cuts(chat: Rendered, template: ChatTemplate, stop: str | None) -> Spans:
    spans: Spans = []
    for i, (start, end) in zip(chat.trained, chat.cuts, strict=True):
        name = f"{chat.where}: messages[{i}]"
        if isinstance(start, int) and isinstance(end, int) and 0 <= start <= end:
            spans.append((start, end))
            continue
        found = _from_marks(chat, i, start, end, stop)
        if found is not None:
            spans.append(found)
            continue
        refused = next((cut for cut in (start, end) if isinstance(cut, str)), None)
        if refused is not None:
            raise InputError(f"{name}: the chat template {template.name} does not render the conversation up to here "
                             f"({chat.read(refused)}), so what is trained cannot be told; give this turn weight 0, or "
                             "begin with a user's")
        raise InputError(f"{name}: the chat template {template.name} writes the conversation up to here otherwise "
                         "once more follows (as those do that leave out the thinking of earlier turns), so what is "
                         "trained cannot be told; give this turn weight 0, or make each answer a sample of its own")
    return spans


def _from_marks(chat: Rendered, i: int, start: int | str, end: int | str, stop: str | None) -> tuple[int, int] | None:
    """The turn of messages[i], whose ``start`` or ``end`` is no place in the text; None where it cannot be told.

    What stands between the prompt of a generation and the content is the model's to say, so a ``start`` that holds
    counts. Without it a call or a thought would lose what the template writes before it.
    """
    if i not in chat.marks:
        return None
    first, last, bound = chat.marks[i]
    if not (isinstance(start, int) and 0 <= start <= first):
        if any(chat.messages[i].get(field) for field in ("tool_calls", *REASONING)):
            return None
        start = first
    if not (isinstance(end, int) and end >= last):
        place = chat.text.find(stop, last, bound) if stop else -1
        if place < 0:       # trained without what ends it, the model would not learn to stop
            return None
        end = place + len(stop or "")
    return start, end


def check_written(chat: Rendered, template: ChatTemplate, spans: Mapping[int, tuple[int, int]]) -> None:
    """InputError where the template leaves out what is said. ``spans``: where each trained message stands.

    What a trained message says must stand there. All of another's must stand in the text, and behind what the message
    before it says, unless marks have shown that it is written or it is a system's, which some templates move. Of an
    answer that is not trained the thought before "</think>" may lack.
    """
    place = 0
    for i, message in enumerate(chat.messages):
        name = f"{chat.where}: messages[{i}]"
        start, end = spans.get(i, (0, len(chat.text)))
        written = chat.text[start:end] if i in spans else chat.text
        if i in spans:
            for field in ("content", REASONING[0]):
                missing, _ = _missing(str(message.get(field, "")), written)
                _refuse(missing, name, f"{'part of ' if field == 'content' else ''}its {field}", chat, template)
            place = max(place, end)
        else:
            said = str(message.get("content", ""))
            if message["role"] == "assistant":
                said = said.rpartition("</think>")[2]
            elif i in (chat.absent or ()):
                _refuse(said.strip(), name, "its content", chat, template)
            free = message["role"] in ("system", "developer") or (
                chat.absent is not None and message["role"] != "assistant")
            missing, at = _missing(said, chat.text, 0 if free else place)
            _refuse(missing, name, "its content", chat, template)
            place = place if free else at
        for call in message.get("tool_calls") or ():
            _check_call(call, written, name, template)
    for place, tool in enumerate(chat.tools or ()):
        title = _function(tool).get("name")
        if isinstance(title, str) and _spelled(title, chat.text) is None:
            raise InputError(f"{chat.where}: the chat template {template.name} leaves out tools[{place}] ({title!r}); "
                             "remove the tools, or use a template that writes them")


def _check_call(call: Any, written: str, name: str, template: ChatTemplate) -> None:
    function = _function(call)
    title, arguments = function.get("name"), function.get("arguments")
    if isinstance(title, str) and _spelled(title, written) is None:
        raise InputError(f"{name}: the chat template {template.name} leaves out its call of {title!r}; remove the "
                         "call, or use a template that writes tool_calls")
    if isinstance(arguments, str) and '"' in arguments and arguments.strip() not in written \
            and json.dumps(arguments, ensure_ascii=False) in written:
        raise InputError(f"{name}: the chat template {template.name} quotes the arguments of {title!r} a second time, "
                         "since they are text; write them as a JSON object")


def _function(tool: Any) -> Mapping[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return inner if isinstance(inner, Mapping) else {}


def _refuse(missing: str | None, name: str, part: str, chat: Rendered, template: ChatTemplate) -> None:
    if missing is not None:
        raise InputError(f"{name}: the chat template {template.name} leaves out {part} ({chat.read(missing[:60])!r}); "
                         "remove that, or use another template")


def _spelled(text: str, written: str, start: int = 0) -> int | None:
    """The end of `text`, as it is or as JSON spells it, in `written` from `start` on; None where it is not."""
    for spelling in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]):
        at = written.find(spelling, start)
        if at >= 0:
            return at + len(spelling)
    return None


def _missing(text: str, written: str, start: int = 0) -> tuple[str | None, int]:
    """(The first line of `text` that is not `written` from `start` on, in their order, or None; where those that are
    end).

    Blanks around a line do not count: templates trim. A text written as a JSON string is written.
    """
    whole = _spelled(text.strip(), written, start)
    if whole is not None:
        return None, whole
    place = start
    for line in text.splitlines():
        at = written.find(line.strip(), place)
        if at < 0:
            return line.strip(), place
        place = at + len(line.strip())
    return None, place


__all__ = ["Spans", "trained_spans"]
