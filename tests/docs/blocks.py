"""Pages as their reader sees them: the fenced blocks, and how each is run: files written, commands and Python run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minitune.cli import main
from tests.files import BASE

FENCE = re.compile(r"```(\w*)[ \t]*(.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``language`` and what follows it (``mark``), its text, and the line on which that begins."""

    language: str
    mark: str
    text: str
    line: int

    @property
    def title(self) -> str | None:
        """The file that the block shows: ```json title="chats.jsonl"."""
        found = re.search(r'title="([^"]+)"', self.mark)
        return found[1] if found else None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in their order. AssertionError for one that never ends."""
    found: list[Block] = []
    lines = text.splitlines()
    place = 0
    while place < len(lines):
        begun = FENCE.fullmatch(lines[place])
        place += 1
        if begun:
            assert "```" in lines[place:], f"line {place}: the block that begins here does not end"
            end = lines.index("```", place)
            found.append(Block(begun[1], begun[2], "".join(line + "\n" for line in lines[place:end]), place + 1))
            place = end + 1
    return found


@dataclass(frozen=True)
class Ran:
    """What a command came to: its exit code and what it said."""

    code: int
    out: str
    err: str


class Runner:
    """Runs the blocks of one page in `folder`, where ``my-llama`` is the small model of the examples.

    `replace`: what is said on the page -> what is run instead. `extra`: command -> flags with their values that are put
    behind it where the page does not give them. `not_run`: beginnings of shell lines that are not run here.
    """

    def __init__(self, folder: Path, replace: dict[str, str], extra: dict[str, dict[str, str]],
                 not_run: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.replace, self.extra, self.not_run = folder, replace, extra, not_run
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.said = ""
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(folder)
        shutil.copytree(BASE, folder / "my-llama")

    def run_page(self, blocks: list[Block]) -> None:
        """The files that the page shows are there from its beginning, as for one who has data of his own."""
        files = [block for block in blocks if block.title is not None]
        assert len({block.title for block in files}) == len(files), "the page shows a file twice"
        for block in files:
            assert block.title is not None
            Path(block.title).write_text(block.text, encoding="utf-8")
        for block in blocks:
            if block.title is None:
                self.run(block)

    def run(self, block: Block) -> None:
        """AssertionError where the block does not do what the page says of it."""
        if block.language == "sh":
            self.said = ""
            for line in commands_of(block.text):
                ran = self.shell(line)
                if ran is not None:
                    wanted = 2 if block.mark == "fails" else 0
                    assert ran.code == wanted, f"{line}\nexit code {ran.code}\n{ran.out}{ran.err}"
                    self.said += ran.out + ran.err
        elif block.language == "python":
            with captured() as (out, err):
                exec(compile("\n" * block.line + self.replaced(block.text), "page", "exec"), self.names)
            self.said = out.getvalue() + err.getvalue()
        else:
            assert block.language == "text", f"line {block.line}: a {block.language or 'nameless'} block is not checked"
            check_output(block.text, self.said)

    def replaced(self, text: str) -> str:
        for said, run in self.replace.items():
            text = text.replace(said, run)
        return text

    def shell(self, line: str) -> Ran | None:
        """One line of a shell: a minitune command, perhaps with < FILE or > FILE. None where it is not run."""
        if line.startswith(self.not_run):
            return None
        lexer = shlex.shlex(self.replaced(line), posix=True, punctuation_chars="<>|&;")
        lexer.whitespace_split = True
        words = list(lexer)
        assert words[0] == "minitune" and not set("|&;") & set(words), f"this test cannot run: {line}"
        files: dict[str, str] = {}
        for mark in "<>":
            if mark in words:
                place = words.index(mark)
                files[mark] = words[place + 1]
                del words[place:place + 2]
        given = Path(files["<"]).read_text(encoding="utf-8") if "<" in files else ""
        more = [part for pair in self.extra.get(words[1], {}).items() if pair[0] not in words for part in pair]
        ran = minitune(self.monkeypatch, [*words[1:], *more], given)
        if ">" in files:
            Path(files[">"]).write_text(ran.out, encoding="utf-8")
            return Ran(ran.code, "", ran.err)
        return ran


def minitune(monkeypatch: pytest.MonkeyPatch, args: list[str], given: str = "") -> Ran:
    """Run a command in this process, with `given` on its stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    code = 0
    with captured() as (out, err):
        try:
            main(args)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    return Ran(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def commands_of(text: str) -> list[str]:
    """The commands of a shell block: without comments and blank lines, those over several lines (\\) joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is what `pattern` says, in which … stands for anything. Blanks count as one."""
    parts = [re.escape(" ".join(part.split())) for part in pattern.split("…")]
    return re.fullmatch(r"\s*.*?\s*".join(parts), " ".join(text.split()), re.DOTALL) is not None


def check_output(shown: str, said: str) -> None:
    """Every line that a page shows was said, in this order; … stands for anything, alone for lines left out."""
    left = iter(said.splitlines())
    for line in shown.splitlines():
        if line.strip() not in ("", "…"):
            assert any(matches(line, each) for each in left), f"the page shows\n{line}\nbut this was said\n{said}"
