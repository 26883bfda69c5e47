"""The command minitune chat: a conversation in the terminal, or one user's line after the other from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from minitune.commands.flags.groups import Sampling
from minitune.config import Data, Quant
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.api import Model

HELP = """\
/reset            begin anew
/system TEXT      begin anew with this system message; without TEXT, with none
/adapter on|off   answer with the adapter, or as the base does
/help             this list
/exit             end, as Ctrl-D does; Ctrl-C stops an answer"""

COMMANDS = ("/reset", "/system", "/adapter", "/help", "/exit", "/quit")


@dataclass(frozen=True)
class Chat:
    """Talk with a model through its chat template. Commands within: /reset, /system, /adapter on|off, /help, /exit.

    Ctrl-C stops an answer, Ctrl-D ends. From a pipe each line that is not blank, and no such command, is a user's
    message; the answers alone go to stdout."""

    base: Positional[Path]
    """Hugging Face folder."""
    adapter: Path | None = None
    """PEFT adapter folder."""
    system: str | None = None
    """System message, before the first turn."""
    tools: Path | None = None
    """JSON file with the tools that the model may call: a list, as a sample's field "tools" has it."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Settings of the model's chat template, as name=value: enable_thinking=false; by default the adapter's."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    sampling: Sampling = field(default_factory=Sampling)

    def run(self) -> None:
        from minitune.api import load

        kwargs = Data(chat_template_kwargs=self.chat_template_kwargs).template_kwargs()
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter,
                     chat_template_kwargs=kwargs)
        sampling = asdict(self.sampling) | ({"tools": self._tools()} if self.tools else {})
        Conversation(model, self.system, self.max_new_tokens, sampling).run()

    def _tools(self) -> list[Any]:
        from minitune.checkpoint.files import open_regular, parse_json

        assert self.tools is not None
        with open_regular(self.tools) as file:
            found = parse_json(file.readall(), str(self.tools))
        if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
            raise InputError(f"{self.tools}: must hold a list of tools, JSON objects, as a sample's field tools does")
        return found


class Conversation:
    """The turns so far, and what a line of the user does to them."""

    def __init__(self, model: Model, system: str | None, max_new_tokens: int, sampling: dict[str, Any]):
        self.model, self.max_new_tokens, self.sampling = model, max_new_tokens, sampling
        self.interactive = sys.stdin.isatty()
        self.with_adapter = True
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Until the input ends or the user does. InputError from a pipe for what a user at a terminal is just told."""
        _ = self.model.tokenizer        # without one nothing can be answered
        if self.interactive:
            self.note(f"{self.model.path}: type a message; /help lists the commands, Ctrl-D ends")
        for line in self.lines():
            try:
                if line.startswith("/") and (self.interactive or line.split()[0] in COMMANDS):
                    if self.command(*line.split(maxsplit=1)):
                        return
                else:
                    self.ask(line)
            except InputError as error:
                if not self.interactive:
                    raise
                self.note(f"minitune: {error}")

    def lines(self) -> Iterator[str]:
        """The user's lines that are not blank."""
        if self.interactive:
            with contextlib.suppress(ImportError):      # not on Windows, whose console has a history of its own
                import readline  # noqa: F401
        while True:
            try:
                line = input("> " if sys.stdout.isatty() else "") if self.interactive else sys.stdin.readline()
            except EOFError:
                self.note("")
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("\n(Ctrl-D or /exit ends)")
                continue
            if not line and not self.interactive:
                return
            if line.strip():
                yield line.rstrip("\r\n")

    def command(self, name: str, rest: str = "") -> bool:
        """Whether it ends the conversation."""
        if name in ("/exit", "/quit"):
            return True
        if name == "/reset":
            self.begin(self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None)
        elif name == "/system":
            self.begin(rest.strip())
        elif name == "/adapter" and rest.strip() in ("on", "off"):
            if self.model.lora is None:
                raise InputError("chat: no adapter is loaded; start with --adapter FOLDER")
            self.with_adapter = rest.strip() == "on"
        elif name == "/help":
            self.note(HELP)
            return False
        else:
            raise InputError(f"chat: {name} {rest}".rstrip() + " is no command; /help lists them (a message that "
                             "begins with / needs a blank before it)")
        self.note({"/adapter": f"(adapter {rest.strip()})"}.get(name, "(a new conversation)"))
        return False

    def ask(self, line: str) -> None:
        """Print the answer as it is written. What Ctrl-C leaves of it stays in the conversation; if that is nothing,
        the message is taken back, as after an error."""
        from minitune.report.terminal import speak

        messages = [*self.messages, {"role": "user", "content": line}]
        pieces: list[str] = []
        note = ""
        with contextlib.nullcontext() if self.with_adapter else self.model.adapter_disabled():
            try:
                answer = self.model.stream(messages, self.max_new_tokens, **self.sampling)
                for piece in answer:
                    pieces.append(piece)
                    speak(piece)
                if answer.finish_reason == "length":
                    note = f"(cut off after {self.max_new_tokens} tokens; --max-new-tokens allows more)"
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                note = "(stopped)"
        print(flush=True)
        if pieces:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        else:
            note += "(an empty answer; the conversation goes on as if you had not asked)"
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        """For the user, not part of any answer."""
        print(text, file=sys.stderr, flush=True)
