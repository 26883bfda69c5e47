"""The fields by which a row's format is recognised, and the map from a file's own field names to these."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any

from minitune.arguments import short
from minitune.errors import InputError


@dataclass(frozen=True)
class Format:
    """The fields of one format: all of ``required`` make it, ``optional`` ones may stand beside them."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @cached_property
    def fields(self) -> frozenset[str]:
        return frozenset(self.required + self.optional)


_TOOLS = ("tools", "functions", "parallel_tool_calls")
FORMATS: dict[str, Format] = {
    "text": Format(("text",)),
    "prompt/completion": Format(("prompt", "completion"), _TOOLS),
    "alpaca": Format(("instruction", "output"), ("input", "system")),
    "openai chat": Format(("messages",), _TOOLS),
    "sharegpt": Format(("conversations",), ("system", *_TOOLS)),
    "gradient": Format(("inputs",), ("multiplier",)),
    "preference": Format(("chosen", "rejected"), ("prompt", *_TOOLS)),
    "openai preference": Format(("input", "preferred_output", "non_preferred_output")),
    "kto": Format(("prompt", "completion", "label"), _TOOLS),
}
"""Name -> fields. No two formats can both be complete in a row whose fields one of them covers."""

COMMON = ("weight",)
"""Fields that any format may have."""

MEANINGFUL = frozenset((
    "images", "image", "audio", "videos", "suffix", "history", "context", "system_prompt", "chat_template_kwargs",
    "sample_weight", "completion_mask", "assistant_masks", "loss_mask", "labels", "masked"))
"""Fields of no format here that would change what a sample teaches, so they are not ignored."""

ACCEPTED = " | ".join(", ".join(form.required) for form in FORMATS.values())
_OWNERS = {name: frozenset(kind for kind, form in FORMATS.items() if name in form.fields)
           for form in FORMATS.values() for name in form.required + form.optional}
_KNOWN = (*_OWNERS, *COMMON)
_REQUIRED = frozenset(name for form in FORMATS.values() for name in form.required)
_MAY_BE_EMPTY = MEANINGFUL | {"tools", "functions", "system"}
_LONGEST_NAME = 40
_UNKNOWN = "no known format"


def check_field_map(field_map: Mapping[str, str]) -> None:
    """InputError unless each of our fields is one that a format has, and each of theirs is named once."""
    for ours, theirs in field_map.items():
        if ours not in _KNOWN:
            close = get_close_matches(str(ours)[:_LONGEST_NAME], _KNOWN, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(_KNOWN)}"
            raise InputError(f"field map: {short(ours)} is no field of a format; {advice}")
        if not isinstance(theirs, str) or not theirs:
            raise InputError(f"field map: {ours} is {short(theirs)}; give the name of a field of the file")
    sources = list(field_map.values())
    twice = next((theirs for theirs in sources if sources.count(theirs) > 1), None)
    if twice is not None:
        both = " and ".join(ours for ours, theirs in field_map.items() if theirs == twice)
        raise InputError(f"field map: {twice!r} is given to {both}; one field can be read as one thing only")
    named = frozenset(field_map) - set(COMMON)
    if named and not any(named <= form.fields for form in FORMATS.values()):
        raise InputError(f"field map: {', '.join(sorted(named))} belong to different formats; accepted: {ACCEPTED}")


def recognise(row: Mapping[str, Any], where: str, field_map: Mapping[str, str] | None = None,
              ) -> tuple[str, dict[str, Any]]:
    """(name of the format, its fields with their values) of a row.

    Null counts as absent, and so do empty tools, an empty system text and what is empty of `MEANINGFUL`; only a label
    that is null is refused, since neither true nor false would be a safe guess. Exactly one format's fields must be
    there, complete, perhaps with "weight". Other fields (id, source, …) are ignored, except those that look like a
    misspelling of one that the row lacks, those that belong to another format, and those that would change what the
    sample means (`MEANINGFUL`). Stanford's "text" beside a complete Alpaca row is ignored too: it is that row, written
    out; and UltraFeedback's "messages" that are the "chosen" ones once more.

    A `field_map` {our field: their field} says which fields are meant, so all that no format with these fields has are
    ignored, whatever they look like. "a.b" names field b of the object a. A mapped field must be in every row, and may
    be null; it takes the place of one of the row's own by that name. Raises InputError that begins with `where`.
    """
    fields = {name: value for name, value in row.items()
              if value is not None and not (name in _MAY_BE_EMPTY and value in ("", [], {}))}
    mapped: tuple[str, ...] = ()
    used: set[str] = set()
    if field_map:
        used = {theirs.split(".", 1)[0] if theirs not in row else theirs for theirs in field_map.values()}
        fields = {name: value for name, value in fields.items() if name not in used and name not in field_map}
        fields |= {ours: value for ours, theirs in field_map.items()
                   if (value := _find(row, theirs, where, ours)) is not None}
        mapped = tuple(ours for ours in field_map if ours not in COMMON)
    elif "rejected" in fields and "messages" in fields and fields["messages"] == fields.get("chosen"):
        del fields["messages"]
    names = tuple(fields)
    cheap = len(names) <= 64 and all(isinstance(name, str) and len(name) <= 64 for name in names)
    kind, fault = (_recognise if cheap else _recognise.__wrapped__)(names, mapped)
    if fault:
        raise InputError(f"{where}: {fault}{_holds_samples(fields) if fault.startswith(_UNKNOWN) else ''}"
                         f"{_null(row, fault, used)}")
    if kind == "prompt/completion" and "label" in row and "label" not in used:
        raise InputError(f"{where}: label is None; it must be true or false")
    known = FORMATS[kind].fields
    return kind, {name: value for name, value in fields.items() if name in known or name in COMMON}


def _find(row: Mapping[str, Any], source: str, where: str, ours: str) -> Any:
    if source in row:
        return row[source]
    value: Any = row
    for part in source.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = list(row)
            close = get_close_matches(source, [str(name)[:_LONGEST_NAME] for name in names], n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"it has {_listed(names)}"
            raise InputError(f"{where}: the field {source!r}, which the field map reads as {ours}, is missing; "
                             f"{advice} (write null where a row has none)")
        value = value[part]
    return value


@lru_cache(maxsize=256)
def _recognise(names: tuple[Any, ...], mapped: tuple[str, ...]) -> tuple[str, str]:
    """(format, "") or ("", what is wrong) of a row with such fields."""
    kinds = [kind for kind, form in FORMATS.items() if form.fields.issuperset(mapped)]
    ours = {name for kind in kinds for name in FORMATS[kind].fields}
    present = [name for name in names if name in ours]
    others = [name for name in names if name not in ours and name not in COMMON]
    if not mapped and {"text", *FORMATS["alpaca"].required}.issubset(present):
        present.remove("text")
    for name in () if mapped else others:
        close = _misspelt(name, ours.union(COMMON).difference(names))
        if close:
            return "", f"unknown field {name!r}; did you mean {close!r}? (a field map reads it as that)"
    if not present:
        return "", (f"{_UNKNOWN}; found the fields: {_listed(others)}; accepted: {ACCEPTED}; a field map reads "
                    "others as these")
    covering = [kind for kind in kinds if FORMATS[kind].fields.issuperset(present)]
    kind = next((kind for kind in covering if set(FORMATS[kind].required).issubset(present)), "")
    if not kind:
        return "", _incomplete(present, kinds, covering, others)
    meant = [] if mapped else [name for name in others if name in MEANINGFUL]
    if meant:
        return "", _unread(meant[0], FORMATS[kind].required[0])
    return kind, ""


def _incomplete(present: list[str], kinds: list[str], covering: list[str], others: list[Any]) -> str:
    """What is wrong with fields that make up no format."""
    if covering:
        form = FORMATS[covering[0]]
        missing = next(name for name in form.required if name not in present)
        return (f"the field {missing!r} is missing beside {present[0]!r}; {covering[0]} rows have "
                f"{', '.join(form.required)}; a field map reads fields of other names as these"
                f"{f': {missing}={others[0]}' if _is_plain(others) else ''}")
    complete = [FORMATS[kind] for kind in kinds if set(FORMATS[kind].required).issubset(present)]
    for form in complete:
        extra = [name for name in present if name not in form.fields]
        if not _REQUIRED.intersection(extra):
            return _unread(extra[0], form.required[0])
    strangers = [(one, other) for one in present for other in present
                 if one in _REQUIRED and other in _REQUIRED and not _OWNERS[one] & _OWNERS[other]]
    names = strangers[0] if strangers else tuple(present)
    return (f"{' and '.join(map(repr, names))} belong to different formats; keep the fields of one, or name them in a "
            f"field map, as {names[-1]}={names[-1]}; accepted: {ACCEPTED}")


def _is_plain(names: list[Any]) -> bool:
    """Whether one name is meant, which a shell takes as it is."""
    return len(names) == 1 and isinstance(names[0], str) and names[0].isidentifier() and len(names[0]) <= 40


def _holds_samples(fields: Mapping[str, Any]) -> str:
    """What to do with a file whose samples stand in a list inside one object, such as {"data": [{…}, {…}]}."""
    lists = [name for name, value in fields.items()
             if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)]
    if len(lists) != 1:
        return ""
    return (f"; {_listed(lists)} holds a list of objects: if these are the samples, write that list alone into a .json "
            "file")


def _null(row: Mapping[str, Any], fault: str, mapped: Collection[str]) -> str:
    """Which of the fields that the row lacks by `fault`, or that a field map names, are there and null."""
    lacks = _REQUIRED if fault.startswith(_UNKNOWN) else {name for name in _REQUIRED if f"{name!r} is missing" in fault}
    found = [name for name, value in row.items() if value is None and (name in lacks or name in mapped)]
    return f"; here {_listed(found)} {'is' if len(found) == 1 else 'are'} null" if found else ""


def _unread(name: str, beside: str) -> str:
    instead = ("give it for all samples at once (--chat-template-kwargs, in Python mt.load's)"
               if name == "chat_template_kwargs" else "name the fields that are meant in a field map")
    return (f"the field {name!r} is not read beside {beside!r}, and would change what the sample means; remove it, or "
            f"{instead}")


def _misspelt(name: Any, known: Collection[str]) -> str | None:
    """The field that `name` may be meant for. A name of any length may stand in a file; comparing takes its square."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or name in MEANINGFUL:
        return None
    close = get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.83)
    return close[0] if close else None


def _listed(names: Collection[Any]) -> str:
    shown = ", ".join(repr(name[:_LONGEST_NAME] if isinstance(name, str) else name) for name in list(names)[:6])
    return (shown or "none") + (", …" if len(names) > 6 else "")


__all__ = ["FORMATS", "check_field_map", "recognise"]
