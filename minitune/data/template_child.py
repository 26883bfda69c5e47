"""Renders chat templates in a process of its own, under limits that the system keeps: template_process.py starts it.

A template is a program of somebody else's. Jinja's sandbox keeps it from Python's internals; this process keeps it from
the machine: it can open no file, and the kernel ends it when a conversation takes too much processor time or memory.
The file is run by its path and imports nothing of minitune, so that it starts quickly.

A batch on stdin: a line with {"source", "variables", "now", "n"}, then n lines of {"messages", "tools", "prompt",
"cuts", "seen"}, or of {"names": true}. For each of these a line on stdout: {"text", "spans", "cuts", "marks",
"absent"}, or {"names"}, which the template reads and does not set itself, or {"error"}.
``spans`` are the [start, end) of what the template wraps in {% generation %}. A cut [k, prompt] asks whether the first
k messages, rendered by themselves, give a beginning of the text: its length, -1 where they do not, or the error. Where
a cut of a message fails, ``marks`` tells where the message stands in the text, found by rendering all once more with
marks around what it says: [message, first character, end of the last, first character of the message behind it];
nothing where that is not certain. ``absent`` are those of the messages ``seen`` that the template does not write, found
in the same way; null where that is not certain.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

MEMORY = 64 * 2**20
"""Bytes that one conversation may take, beside 32 for each byte of its own."""
SECONDS = 0.4
"""Processor time for one conversation, beside what `_allowance` adds for its length."""
NEXT, OPEN, CLOSE = "\udffd", "\udffe", "\udfff"
"""OPEN and CLOSE stand around what {% generation %} wraps and what a marked message says, NEXT before the message
behind. Text has no lone surrogates (they are refused before), so none is mistaken."""
_MARKS = re.compile(f"([{NEXT}{OPEN}{CLOSE}])")
_SEEN = re.compile("[\ud800-\udbff]")
"""The marks in what messages say, one of 1024 for each; low surrogates stand for the control strings that they spell.
"""
_BEYOND_ASCII = re.compile("[^\\x00-\\x7f\\ud800-\\udfff]")      # lone surrogates stand for control strings: left alone


def environment() -> Any:
    """Jinja as transformers sets it up, so that a template means here what it means there."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what the model says."""

        tags = {"generation"}       # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        return _BEYOND_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = datetime.now().strftime
    return made


def _confine() -> Any:
    """No file from here on and, unless it runs as root, no child process. Returns what sets the memory limit to so many
    bytes more than now."""
    try:
        import resource
    except ImportError:                 # Windows has no such limits
        return lambda extra: None
    for kind, limit in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_FSIZE, 0),
                        (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    used = _PAGES * resource.getpagesize()
    high = resource.getrlimit(resource.RLIMIT_AS)[1]

    def limit_memory(extra: int) -> None:
        with contextlib.suppress(ValueError, OSError):      # macOS may refuse
            resource.setrlimit(resource.RLIMIT_AS, (used + extra, high))

    return limit_memory


def _pages() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0])
    except OSError:
        return 2**15


def _limit_time(seconds: float) -> None:
    """Ends the process, even inside a call of C, after so much processor time from now; 0 lifts the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _allowance(size: int, renders: int) -> float:
    return SECONDS + renders * (0.001 + size * 1e-6)


def _render(template: Any, variables: dict[str, Any], request: dict[str, Any], size: int) -> dict[str, Any]:
    messages, tools = request["messages"], request["tools"]

    def write(messages: list[dict[str, Any]], prompt: bool) -> str:
        found = template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt,
                                **variables)
        if len(found) > MEMORY // 8 + 8 * size:
            raise MemoryError
        return str(found)

    text, spans = _spans(write(messages, request["prompt"]))
    if _SEEN.search(text):
        raise ValueError("it writes a lone surrogate, which is no character")
    cuts: list[int | str] = []
    for count, prompt in request["cuts"]:
        try:
            part = write(messages[:count], prompt)
        except MemoryError:
            raise
        except Exception as error:
            cuts.append(_name(error))
        else:
            cuts.append(len(part) if text.startswith(part) else -1)
    failed = {count - (not prompt) for (count, prompt), cut in zip(request["cuts"], cuts, strict=True)
              if isinstance(cut, str) or cut < 0}
    marks = [place for message in sorted(failed)
             if (place := _place(message, text, messages, lambda marked: write(marked, request["prompt"])))]
    absent = _absent(text, messages, request["seen"], lambda marked: write(marked, request["prompt"]))
    return {"text": text, "spans": spans, "cuts": cuts, "marks": marks, "absent": absent}


def _absent(text: str, messages: list[dict[str, Any]], seen: list[int], write: Callable[[list[dict[str, Any]]], str]
            ) -> list[int] | None:
    """Which of the messages `seen` the template leaves out; None where marks change what it writes, or are too few.

    The mark stands in the middle of the content: a template may look at how that begins and ends, and trim it.
    """
    marked = list(messages)
    marks: dict[int, str] = {}
    for number in seen:
        content = messages[number].get("content")
        if isinstance(content, str) and (core := content.strip()):
            marks[number] = chr(0xD800 + len(marks))
            middle = content.index(core) + len(core) // 2
            marked[number] = {**messages[number], "content": content[:middle] + marks[number] + content[middle:]}
    if not marks or len(marks) > 1024:
        return None if marks else []
    try:
        written = _spans(write(marked))[0]
    except MemoryError:
        raise
    except Exception:       # the template refuses what the marks made of the content: they tell nothing
        return None
    found = set(_SEEN.findall(written))
    return [number for number, mark in marks.items() if mark not in found] if _SEEN.sub("", written) == text else None


def _place(number: int, text: str, messages: list[dict[str, Any]], write: Callable[[list[dict[str, Any]]], str]
           ) -> list[int] | None:
    """Where message `number` stands in the text, as ``marks`` tells it.

    It is certain only where the template writes the same text around the marks, each of them once. It may trim: then
    they must stand inside of what it cuts off.
    """
    for inside in (False, True):
        marked, count = list(messages), 0
        marked[number], count = _wrapped(messages[number], OPEN, CLOSE, inside)
        behind = 0
        if number + 1 < len(messages):
            marked[number + 1], behind = _wrapped(messages[number + 1], NEXT, "", inside)
        try:
            parts = _MARKS.split(write(marked))
        except MemoryError:
            raise
        except Exception:       # the template refuses what the marks made of the content: they tell nothing
            return None
        if "".join(parts[::2]) != text:
            continue
        ends = [len("".join(parts[:place:2])) for place in range(1, len(parts), 2)]
        found = {mark: [end for end, part in zip(ends, parts[1::2], strict=True) if part == mark]
                 for mark in (OPEN, CLOSE, NEXT)}
        bound = min(found[NEXT], default=-1) if number + 1 < len(messages) else len(text)
        if count and len(found[OPEN]) == len(found[CLOSE]) == count and len(found[NEXT]) == behind \
                and max(found[CLOSE]) <= bound:
            return [number, min(found[OPEN]), max(found[CLOSE]), bound]
    return None


def _wrapped(message: dict[str, Any], left: str, right: str, inside: bool) -> tuple[dict[str, Any], int]:
    """The message with marks around its content and the names of the functions it calls, and how many were marked.
    ``inside``: the content's outer blanks stay outside of the marks."""
    calls, content = message.get("tool_calls") or [], message.get("content")
    made, count = dict(message), 0
    if isinstance(content, str) and (content.strip() or not calls):
        core = content.strip() if inside else content
        head, _, tail = content.partition(core) if core else ("", "", content)
        made["content"] = f"{head}{left}{core}{right}{tail}"
        count += 1
    if calls:
        made["tool_calls"] = [_named(call, left, right) for call in calls]
        count += len(calls)
    return made, count


def _named(call: dict[str, Any], left: str, right: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _named(call["function"], left, right)}
    return {**call, "name": f"{left}{call.get('name')}{right}"}


def _spans(text: str) -> tuple[str, list[list[int]]]:
    """The text without marks, and the outermost [start, end) between them."""
    parts: list[str] = []
    spans: list[list[int]] = []
    depth = place = 0
    for part in _MARKS.split(text):
        if part == OPEN:
            spans += [] if depth else [[place, place]]
            depth += 1
        elif part == CLOSE and depth:
            depth -= 1
            spans[-1][1] = place
        elif part in (CLOSE, NEXT):
            raise ValueError("it writes a lone surrogate, which is no character")
        else:
            parts.append(part)
            place += len(part)
    if depth:
        raise ValueError("it writes a lone surrogate, which is no character")
    return "".join(parts), spans


def _name(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY >> 20} MiB"
    line = getattr(error, "lineno", None)
    told = " ".join(f"{error or type(error).__name__}".split())[:300]
    return f"line {line}: {told}" if line else told


def _answer(templates: dict[str, Any], jinja: Any, meta: Any, header: dict[str, Any], request: dict[str, Any],
            size: int) -> bytes:
    try:
        source = header["source"]
        if request.get("names"):        # jinja computes the constants of a template to find them
            return json.dumps({"names": sorted(meta.find_undeclared_variables(jinja.parse(source)))}).encode()
        if source not in templates:
            templates[source] = jinja.from_string(source)
        return json.dumps(_render(templates[source], header["variables"], request, size)).encode()
    except Exception as error:
        told = _name(error)
    gc.collect()
    return json.dumps({"error": told}).encode()


def main() -> None:
    """Serves batches until stdin ends."""
    global _PAGES
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path.append(sys.argv[1])
    made = environment()
    import html  # noqa: F401  these two are imported at their first use, when no file can be opened any more

    import jinja2.debug  # noqa: F401
    from jinja2 import meta
    made.from_string("{{ strftime_now('%c %Z') }}{% for x in y %}{{ loop.index }}{% endfor %}").render(y=[1])
    _PAGES = _pages()
    limit_memory = _confine()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    templates: dict[str, Any] = {}
    held = 0
    while header_line := source.readline():
        header = json.loads(header_line)
        made.globals["strftime_now"] = datetime.fromisoformat(header["now"]).strftime
        lines = [source.readline() for _ in range(header["n"])]
        held = max(held, sum(map(len, lines)))      # what a batch took may stay with the process
        for line in lines:
            request = json.loads(line)
            limit_memory(MEMORY + held + 32 * len(line))
            _limit_time(_allowance(len(line), 2 + 3 * len(request.get("cuts", ()))))
            found = _answer(templates, made, meta, header, request, len(line))
            _limit_time(0)
            limit_memory(2**40)
            sink.write(found + b"\n")
            sink.flush()


_PAGES = 0

if __name__ == "__main__":
    main()
    os._exit(0)
