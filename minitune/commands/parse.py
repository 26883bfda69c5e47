"""A command line -> the command to run, through tyro; every misuse ends in one InputError, whatever tyro would draw."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from minitune.commands import COMMANDS
from minitune.commands.fields import choices, describe, options, settings
from minitune.commands.settings import read_defaults
from minitune.commands.shared import nearest
from minitune.commands.shown import own, shown, word
from minitune.config import short
from minitune.errors import InputError

FLAG = re.compile(r"(--[A-Za-z][\w-]*)(=.*)?", re.DOTALL)
FOREIGN = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
"""A flag as others write it: with dots, or behind one hyphen."""
LIKE_A_FLAG = re.compile(r"--?(?!h$|(?i:inf|infinity|nan)$)[A-Za-z].*", re.DOTALL)
"""What tyro takes for a flag too, whatever else stands in it."""


def parse(name: str, args: Sequence[str]) -> Any:
    """The command `name` with its settings from the class, --config FILE.toml and the flags, the last winning.

    Raises InputError for what is wrong, SystemExit(0) after --help.
    """
    command = load_command(name)
    twin = shown(command)
    given = _check_flags(name, args, settings(twin))
    file = _config_of(args)
    default: dict[str, Any] = {}
    if file is not None:
        default["default"], in_file = read_defaults(twin, file)
        given |= in_file
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _colours():
            made: Any = tyro.cli(twin, prog=f"minitune {name}", args=list(args), config=(OmitArgPrefixes,), **default)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise InputError(f"{name}: {_plain(said.getvalue(), settings(twin))} ({_see(name)})") from None
    sys.stderr.write(said.getvalue())
    found = own(made, command)
    object.__setattr__(found, "given", frozenset(given))       # no field: it is nothing that a flag could set
    return found


def load_command(name: str) -> type[Any]:
    """The dataclass of a command."""
    found: type[Any] = getattr(importlib.import_module(f"minitune.commands.{name}"), COMMANDS[name][0])
    return found


def completion(shell: str) -> None:
    """Print the script that completes commands and flags in a shell: bash, zsh or fish."""
    if shell not in ("bash", "zsh", "fish"):
        raise InputError(f"--completion is {short(shell)}; it must be bash, zsh or fish")
    every = [Annotated[shown(load_command(name)), tyro.conf.subcommand(name)] for name in COMMANDS]
    whole: Any = every[0]
    for each in every[1:]:
        whole = whole | each
    tyro.cli(whole, prog="minitune", args=["--tyro-print-completion", shell],
             config=(OmitArgPrefixes, OmitSubcommandPrefixes))


@contextlib.contextmanager
def _colours() -> Iterator[None]:
    """NO_COLOR (no-color.org) counts; tyro looks at TERM alone."""
    terminal = os.environ.get("TERM")
    if terminal is None or not os.environ.get("NO_COLOR"):
        yield
        return
    os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ["TERM"] = terminal


def _config_of(args: Sequence[str]) -> Path | None:
    """The file that --config names, the last one where there are several."""
    file = None
    for arg, value in itertools.zip_longest(args, args[1:], fillvalue=""):
        if arg == "--":
            break
        if arg == "--config" and value and not FLAG.fullmatch(value):
            file = Path(value)
        elif arg.startswith("--config="):
            file = Path(arg.removeprefix("--config="))
    return file


def _check_flags(name: str, args: Sequence[str], known: dict[tuple[str, ...], Any]) -> set[tuple[str, ...]]:
    """The paths of the settings that flags give. InputError for a flag that the command does not have, and for a single
    value that its flag does not take."""
    paths = {f"--{path[-1].replace('_', '-')}": path for path in known}
    given: set[tuple[str, ...]] = set()
    hints = {f"--{path[-1].replace('_', '-')}": hint for path, hint in known.items()}
    every = {"--help"} | set(hints) | {f"--no-{flag[2:]}" for flag, hint in hints.items() if hint is bool}
    for arg, following in itertools.zip_longest(args, args[1:]):
        if arg == "--":
            break
        match = FLAG.fullmatch(arg)
        if match is None and LIKE_A_FLAG.fullmatch(arg):
            _check_foreign(name, arg, every)
            raise InputError(f"{name}: {short(arg)} looks like a flag; put -- before text that begins with a hyphen, "
                             f"or = between a flag and such a value ({_see(name)})")
        if match is None:
            continue
        flag = f"--{match[1][2:].replace('_', '-')}"
        if flag not in every:
            positional = nearest(flag[2:], {path[0] for path in known})
            meant = nearest(flag[2:], {each[2:] for each in every}) or positional
            hint = f"; did you mean --{meant}?" if meant else ""
            raise InputError(f"{name}: there is no flag {short(match[1])[1:-1]}{hint} ({_see(name)})")
        value = match[2][1:] if match[2] is not None else following
        if value is not None and flag in hints:
            _check_value(name, flag, value, hints[flag])
        setting = paths.get(flag) or paths.get(f"--{flag.removeprefix('--no-')}")
        given |= set() if setting is None else {setting}
    return given


def _check_foreign(name: str, arg: str, every: set[str]) -> None:
    """InputError for a flag as others write it (--train.epochs, -r) that is meant to be one of ours."""
    if FOREIGN.fullmatch(arg):
        flag = arg.partition("=")[0]
        meant = nearest(flag.lstrip("-").rpartition(".")[2], {each[2:] for each in every})
        if meant:
            raise InputError(f"{name}: there is no flag {short(flag)[1:-1]}; did you mean --{meant}? ({_see(name)})")


def _check_value(name: str, flag: str, value: str, hint: Any) -> None:
    (kind, *more) = options(hint)
    allowed = [*map(str, choices(hint)), *(["None"] if NoneType in get_args(hint) else [])]
    if choices(hint) and value not in allowed:
        meant = nearest(value, allowed)
        raise InputError(f"{name}: {flag} is {short(value)}; it must be {describe(hint)}"
                         f"{f'; did you mean {meant}?' if meant else ''} ({_see(name)})")
    if kind in (int, float) and not more and value not in allowed:
        try:
            kind(value)
        except ValueError:
            raise InputError(f"{name}: {flag} is {short(value)}; it must be {describe(hint)} ({_see(name)})") from None


def _plain(box: str, known: dict[tuple[str, ...], Any]) -> str:
    """What tyro drew on stderr, as one line: without the frame, the title and the pointer to --help, with what the flag
    takes that it names."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"^\s?[│|]? | ?[│|]?$", "", line) for line in text.splitlines()]
    lines = [line.rstrip() for line in lines if not re.match(r"\s*[╭╰]|[\s─-]*$", line)]
    body = lines[:next((i for i, line in enumerate(lines) if re.match("For full helptext|Argument help", line)), None)]
    missing = [line.strip() for line in body if re.match(r" {4}\S", line)]
    if missing and any(line.startswith("Missing from") for line in body):
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    text = " ".join(" ".join(body).split()).rstrip(".!") or "the command line is not understood"
    text = text.replace("Unrecognized options: ", "not understood: ")
    flag = re.search(r"--([a-z][a-z0-9-]*)", text)
    hint = next((hint for path, hint in known.items() if flag and path[-1] == flag[1].replace("-", "_")), None)
    return f"{text}; write {flag[0]} {word(hint)}" if flag and hint and word(hint) else text


def _see(name: str) -> str:
    return f"see minitune {name} --help"
