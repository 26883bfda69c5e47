"""How a command's dataclasses look as flags: their texts, and what stands for a value, written out for tyro.

tyro reads texts and types by itself, but shows every positional argument as its type (PATH PATH), what may be left out
as {None}|INT … (default: None), and keeps a text's line breaks. So it is given twins of the dataclasses that say all
this; `own` turns what it makes back into the command.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from minitune.commands.flags.declared import POSITIONAL, choices, options

CONFIG = "TOML file of settings by the names that they have here (seed = 1); what the command line says wins over it."
WORDS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


def shown(command: type[Any]) -> type[Any]:
    """The twin of a command, with --config beside its own flags."""
    note = Annotated[Path | None, tyro.conf.arg(help=CONFIG, metavar="FILE.toml", help_behavior_hint="")]
    return _twin(command, (("config", note, dataclasses.field(default=None, kw_only=True)),))


def own(value: Any, command: type[Any]) -> Any:
    """What tyro made of the twin -> an instance of the command itself."""
    if not dataclasses.is_dataclass(command):
        return value
    hints = get_type_hints(command)
    return command(**{field.name: own(getattr(value, field.name), hints[field.name])
                      for field in dataclasses.fields(command)})


def _twin(owner: type[Any], more: tuple[Any, ...] = ()) -> type[Any]:
    hints, texts = get_type_hints(owner, include_extras=True), texts_of(owner)
    fields = []
    for field in dataclasses.fields(owner):
        hint, text = hints[field.name], texts.get(field.name, "")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = _twin(hint)
            start = dataclasses.field(default_factory=functools.partial(_start, inner, field.default_factory),
                                      kw_only=field.kw_only)
            fields.append((field.name, Annotated[inner, tyro.conf.arg(help=text or _doc(hint, 1))], start))
            continue
        default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        empty = (default if field.default is dataclasses.MISSING else field.default) in (None, (), "", {})
        needed = (field.default, field.default_factory) == (dataclasses.MISSING, dataclasses.MISSING)
        metavar = word(hint)
        if POSITIONAL in getattr(hint, "__metadata__", ()):
            metavar = field.name.upper() if needed else f"[{field.name.upper()}]"
        note = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="" if empty and not needed else None)
        fields.append((field.name, Annotated[hint, note], copy.copy(field)))
    return dataclasses.make_dataclass(owner.__name__, [*fields, *more], bases=(owner,), frozen=True,
                                      namespace={"__doc__": _doc(owner, None if more else 1), "__module__": __name__})


def _start(twin: type[Any], factory: Any) -> Any:
    """The default of a nested twin."""
    made = factory()
    return twin(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def texts_of(owner: type[Any]) -> dict[str, str]:
    """Field -> the text that stands below it in the source, in one line; of base classes too. Nothing where the source
    is not at hand."""
    found: dict[str, str] = {}
    for each in reversed([each for each in owner.__mro__ if dataclasses.is_dataclass(each)]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except OSError:
            return {}
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)):
                found[field.target.id] = " ".join(text.value.value.split()).replace("`", "")
    return found


def _doc(owner: type[Any], n_paragraphs: int | None) -> str:
    """The first paragraphs of a class's text (None: all), a line each."""
    paragraphs = inspect.cleandoc(owner.__doc__ or "").split("\n\n")[:n_paragraphs]
    return "\n\n".join(" ".join(each.split()).replace("`", "") for each in paragraphs)


def word(hint: Any) -> str | None:
    """What stands for a value of this type in the help; None leaves that to tyro."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if choices(hint):
        return f"{{{','.join(map(str, choices(hint)))}}}"
    kind = options(hint)[-1]
    inner = [word(each) for each in get_args(kind) if each is not Ellipsis]
    if get_origin(kind) in (tuple, list):
        return f"{inner[0]} ..."
    if get_origin(kind) in (dict, Mapping):
        return f"NAME {inner[1]} ..."
    return None if get_origin(kind) is Literal else WORDS.get(kind)
