"""The command line: which command is run, and how each error ends. torch is loaded only when a command needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from minitune.arguments import short
from minitune.commands import COMMANDS
from minitune.errors import InputError, NotSaved, out_of_memory
from minitune.names import nearest

DESCRIPTION = "Fine-tune Llama-family models with LoRA on one NVIDIA GPU or a CPU."
OVERVIEW = f"""\
usage: minitune COMMAND ...

{DESCRIPTION}

commands:
{{commands}}

minitune COMMAND --help      lists what a command takes; each takes --config FILE.toml
minitune --version           prints the version
minitune --completion SHELL  prints the completion script of bash, zsh or fish, e.g.
                             eval "$(minitune --completion bash)" in ~/.bashrc
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command. User errors end in one line on stderr and exit code 2, and a warning is one line too."""
    if args is None:        # the process is the command's alone
        warnings.showwarning = _show_warning
    try:
        _run(list(sys.argv[1:] if args is None else args))
        sys.stdout.flush()
    except BrokenPipeError:             # `minitune … | head` has read enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        raise SystemExit(getattr(error, "exit_code", 130)) from None
    except Exception as error:
        code, message = _ending(error)
        if code is None:
            raise
        for line in (message, *getattr(error, "__notes__", ())):
            print(f"minitune: {line}", file=sys.stderr)
        raise SystemExit(code) from None


def _run(args: list[str]) -> None:
    for arg in args:
        if not arg.isascii() and arg != arg.encode("utf-8", "replace").decode():
            raise InputError(f"{short(arg)} is not UTF-8; give what it names another name, or set a locale of UTF-8")
    name = args[0] if args else None
    if name is None or name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {each:<{width}}  {what}" for each, (_, what) in COMMANDS.items())
        print(OVERVIEW.format(commands=commands), end="", file=sys.stderr if name is None else sys.stdout)
        if name is None:
            raise SystemExit(2)
    elif name == "--version":
        print(f"minitune {sys.modules['minitune'].__version__}")      # of the package around this file
    elif name.partition("=")[0] == "--completion":
        from minitune.commands.flags.parse import completion

        completion(name.partition("=")[2] or " ".join(args[1:2]))
    elif name in COMMANDS:
        from minitune.commands.flags.parse import parse

        command = parse(name, args[1:])
        _load()
        command.run()
    else:
        known = [*COMMANDS, "--help", "--version", "--completion"]
        meant = nearest(name, known)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {short(name)}; {hint} (minitune --help tells what each does)")


def _load() -> None:
    """Loads torch and all that the commands use. Until then Ctrl-C ends the process at once: the exception that it is
    later can get lost within an import, or leave half a library behind."""
    import minitune.api  # noqa: F401

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """Without the place in our source that Python shows."""
    with contextlib.suppress(OSError):      # nobody reads it any more, as Python's own does
        print(f"minitune: warning: {message}", file=sys.stderr)


def _ending(error: Exception) -> tuple[int | None, str]:
    """(exit code, message) of an error that a user can understand; (None, "") for one that is a fault of ours."""
    if isinstance(error, InputError):
        return 1 if isinstance(error, NotSaved) else 2, str(error)
    if isinstance(error, OSError):
        return 2, f"{error.filename or 'a file'}: {error.strerror or error}"
    if told := out_of_memory(error):
        said = any("memory ran out" in note for note in getattr(error, "__notes__", ()))        # a step of a run did
        return 1, told if said else f"{told}; take fewer tokens, a smaller rank or model, or --quant nf4-dq"
    # By name: its module is loaded where it is raised, and loads torch.
    return (1, str(error)) if type(error).__name__ == "TrainingDiverged" else (None, "")
