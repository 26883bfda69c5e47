"""A command line -> the command to run, through tyro; every misuse ends in one InputError, whatever tyro would draw."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from minitune.arguments import short
from minitune.commands import COMMANDS
from minitune.commands.flags.config_file import LARGEST, read_defaults
from minitune.commands.flags.declared import choices, describe, options, positionals, settings
from minitune.commands.flags.help import own, shown, word
from minitune.commands.flags.settings_file import SETTINGS
from minitune.commands.flags.suggestions import instead, instead_of_value
from minitune.config import LINEAR_NAMES
from minitune.errors import InputError
from minitune.names import nearest

FLAG = re.compile(r"(--[A-Za-z][\w-]*)(=.*)?", re.DOTALL)
FOREIGN = re.compile(r"--?[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
"""A flag as others write it: with dots, or behind one hyphen."""
LIKE_A_FLAG = re.compile(r"--?(?!h$|(?i:inf|infinity|nan)$)[A-Za-z].*", re.DOTALL)
"""What tyro takes for a flag too, whatever else stands in it."""
OF_LINEARS = ("--targets", "--rank-pattern", "--alpha-pattern")
LINEARS = (*LINEAR_NAMES, "lm_head", "all-linear")
"""The plain names that the values of these flags may be."""


def parse(name: str, args: Sequence[str]) -> Any:
    """The command `name` with its settings from the class, --config FILE.toml (under --resume that of the run's folder)
    and the flags, the last winning.

    Raises InputError for what is wrong, SystemExit(0) after --help.
    """
    command = load_command(name)
    twin = shown(command)
    given = _check_flags(name, args, twin)
    file = _file_of(command, args)
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
        resumed = _how_to_resume(command, args) if "--resume" in args else ""
        fault = _with_files(_plain(said.getvalue(), settings(twin)), args, twin)
        taken = _taken(args, twin) if fault.endswith(" missing") else ""
        raise InputError(f"{name}: {fault}{taken}{resumed} ({_see(name)})") from None
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


def _file_of(command: type[Any], args: Sequence[str]) -> Path | None:
    """The file that --config names; without it, under --resume, the settings that the run's folder keeps."""
    named = _value_of(args, "--config")
    flags = [arg for arg in itertools.takewhile(lambda arg: arg != "--", args) if arg in ("--resume", "--no-resume")]
    if named is not None or flags[-1:] != ["--resume"]:
        return None if named is None else Path(named)
    named = _value_of(args, "--out")
    behind = _value_of(args, "--resume")
    if named is None and behind is not None and (Path(behind) / SETTINGS).is_file():
        raise InputError(f"train: --resume takes no value, and --out names the run's folder: minitune train --resume "
                         f"--out {behind}")
    out = Path(named or command.out)
    if not out.is_dir():
        ways = "begin it without resume" if named else "name the run's folder with --out, or begin it without resume"
        raise InputError(f"{out}: there is no run to resume; {ways}")
    kept = out / SETTINGS
    return kept if kept.is_file() and kept.stat().st_size <= LARGEST else None


def _how_to_resume(command: type[Any], args: Sequence[str]) -> str:
    """What to do where flags under --resume make no command."""
    kept = Path(_value_of(args, "--out") or command.out) / SETTINGS
    if kept.parent.is_dir() and not any(kept.parent.iterdir()):
        return f"; {kept.parent} is empty, so there is no run to resume: begin it without --resume"
    if kept.parent.is_dir() and not kept.is_file():
        return (f"; there is no {kept}, which --resume reads (a run that Python began has none): give what the run was "
                "begun with, or resume it in Python")
    return "; to go on with a run say minitune train --resume --out FOLDER"


def _value_of(args: Sequence[str], flag: str) -> str | None:
    """What a flag is set to, the last time where there are several."""
    found = None
    for arg, value in itertools.zip_longest(args, args[1:], fillvalue=""):
        if arg == "--":
            break
        if arg == flag and value and not FLAG.fullmatch(value):
            found = value
        elif arg.startswith(f"{flag}="):
            found = arg.removeprefix(f"{flag}=")
    return found


def _check_flags(name: str, args: Sequence[str], command: type[Any]) -> set[tuple[str, ...]]:
    """The paths of the settings that flags give. InputError for a flag that the command does not have, and for a value
    that its flag does not take."""
    known, places = settings(command), positionals(command)
    paths = {f"--{path[-1].replace('_', '-')}": path for path in known if path not in places}
    every = {"--help"} | set(paths) | {f"--no-{flag[2:]}" for flag, path in paths.items() if known[path] is bool}
    given: set[tuple[str, ...]] = set()
    left = 0        # how many of the next ones belong to the last flag
    for place, arg in enumerate(args):
        if arg == "--":
            break
        match = FLAG.fullmatch(arg)
        if match is None and LIKE_A_FLAG.fullmatch(arg):
            _check_foreign(name, arg, every)
            raise InputError(f"{name}: {short(arg)} looks like a flag; put -- before text that begins with a hyphen, "
                             f"or = between a flag and such a value ({_see(name)})")
        if match is None:
            if not arg and not left and all(known[path] is Path for path in places):
                raise InputError(f"{name}: an argument is empty; its value may be a shell variable that is not set "
                                 f"({_see(name)})")
            left -= 1 if left else 0
            continue
        flag = f"--{match[1][2:].replace('_', '-')}"
        if flag not in every:
            raise InputError(f"{name}: there is no flag {short(match[1])[1:-1]}{_instead(name, flag, every, places)} "
                             f"({_see(name)})")
        if flag in paths:
            values = [match[2][1:]] if match[2] is not None else _values(args[place + 1:])
            if not values and known[paths[flag]] is not bool:
                raise InputError(f"{name}: {flag} has no value; write {flag} {word(known[paths[flag]])} ({_see(name)})")
            _check_values(name, flag, values, known[paths[flag]])
            alone = match[2] is not None or known[paths[flag]] is bool
            left = 0 if alone else len(values) if _takes_several(known[paths[flag]]) else 1
        setting = paths.get(flag) or paths.get(f"--{flag.removeprefix('--no-')}")
        given |= set() if setting is None else {setting}
    return given


def _values(args: Sequence[str]) -> list[str]:
    """What stands behind a flag, up to the next one."""
    return list(itertools.takewhile(lambda arg: arg != "--" and not LIKE_A_FLAG.fullmatch(arg), args))


def _takes_several(hint: Any) -> bool:
    """Whether a flag takes all that stands behind it."""
    return any(get_origin(option) in (tuple, list, dict, Mapping) for option in options(hint))


def _taken(args: Sequence[str], command: type[Any]) -> str:
    """What a flag took that takes all that stands behind it, for a line in which what has a place is missing."""
    several = {f"--{path[-1].replace('_', '-')}" for path, hint in settings(command).items() if _takes_several(hint)}
    for place, arg in enumerate(args):
        values = _values(args[place + 1:]) if arg in several else []
        if len(values) > 1:
            usage = " and ".join(path[-1].upper() for path in positionals(command))
            return f"; {arg} took {short(' '.join(values))}, so {usage} come before it"
    return ""


def _with_files(fault: str, args: Sequence[str], command: type[Any]) -> str:
    """`fault`, with what is done here with files beside DATA, where it is those that are not understood. tyro may have
    broken their names at the end of a line."""
    said, _, left = fault.partition("not understood: ")
    whole = left.replace(" ", "")
    files = [arg for arg in dict.fromkeys(args) if os.path.exists(arg) and arg in whole]
    if said or not files or "".join(files) != whole or ("samples", "mix") not in settings(command):
        return fault
    return f"not understood: {' '.join(files)}; more data goes into --mix {' '.join(f'{name}=1' for name in files)}"


def _instead(name: str, flag: str, every: set[str], places: Collection[tuple[str, ...]]) -> str:
    """What is said behind "there is no flag …"."""
    found = instead(flag[2:], {each[2:] for each in every}, "--")
    meant = nearest(flag[2:], [path[-1] for path in places])
    if found or not meant:
        return found
    usage = " ".join(path[-1].upper() for path in places)
    return f"; {meant.upper()} is told by its place: minitune {name} {usage}"


def _check_foreign(name: str, arg: str, every: set[str]) -> None:
    """InputError for a flag as others write it (--train.epochs, -r) that is meant to be one of ours."""
    if FOREIGN.fullmatch(arg):
        flag = arg.partition("=")[0]
        hint = instead(flag.lstrip("-").rpartition(".")[2], {each[2:] for each in every}, "--")
        if hint:
            raise InputError(f"{name}: there is no flag {short(flag)[1:-1]}{hint} ({_see(name)})")


def _check_values(name: str, flag: str, values: list[str], hint: Any) -> None:
    """InputError for values that are not of the flag's type, as far as these are simple, and for typos in names of
    linears, which else only the loaded model would find."""
    (kind, *more) = options(hint)
    allowed = [*map(str, choices(hint)), *(["None"] if NoneType in get_args(hint) else [])]
    if choices(hint) and values and values[0] not in allowed:
        raise InputError(f"{name}: {flag} is {short(values[0])}; it must be {describe(hint)}"
                         f"{instead_of_value(values[0], allowed)} ({_see(name)})")
    if kind in (int, float) and not more and values and values[0] not in allowed and not _is(kind, values[0]):
        raise InputError(f"{name}: {flag} is {short(values[0])}; it must be {describe(hint)} ({_see(name)})")
    if kind is Path and values[:1] == [""]:
        raise InputError(f"{name}: {flag} is empty; give a path ({_see(name)})")
    if get_origin(kind) in (dict, Mapping) and values:
        number = get_args(kind)[1]
        if len(values) % 2 or not all(_is(number, value) for value in values[1::2]):
            raise InputError(f"{name}: {flag} is {short(' '.join(values))}; it takes names, each with "
                             f"{describe(number)}: {flag} {word(hint)} ({_see(name)})")
        values = values[::2]
    if flag in OF_LINEARS:
        for value in values:
            apart = value.replace(",", " ").split()
            if len(apart) > 1 and set(apart) <= set(LINEARS):
                raise InputError(f"{name}: {flag} has {short(value)}; names stand apart, {flag} {' '.join(apart)} "
                                 f"({_see(name)})")
            meant = nearest(value, LINEARS) if re.fullmatch(r"[\w-]+", value) and value not in LINEARS else None
            if meant:
                raise InputError(f"{name}: {flag} has {short(value)}, which names no linear; did you mean {meant}? "
                                 f"({_see(name)})")


def _is(kind: type[int] | type[float], value: str) -> bool:
    """Whether a text is such a number."""
    try:
        kind(value)
    except ValueError:
        return False
    return True


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
    text = re.sub("(Unrecognized options )?Unrecognized options: ", "not understood: ", text)
    flag = re.search(r"--([a-z][a-z0-9-]*)", text)
    hint = next((hint for path, hint in known.items() if flag and path[-1] == flag[1].replace("-", "_")), None)
    return f"{text}; write {flag[0]} {word(hint)}" if flag and hint and word(hint) else text


def _see(name: str) -> str:
    return f"see minitune {name} --help"
