"""The base model's corpus: documentation that Python and torch carry, cleaned, each text once, split by its hash."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 128
"""One document in so many is held out: those whose hash is divisible by this number."""
PIECE_CHARS = 1500
"""A long document is cut between paragraphs into pieces of at most this many characters (about 450 tokens)."""
SHORTEST = 40

STDLIB_SKIPPED = {"site-packages", "test", "tests", "lib2to3", "ensurepip", "turtledemo", "__pycache__", "pydoc_data"}
TORCH_SKIPPED = {"testing", "_vendor", "__pycache__", "include", "_inductor", "_dynamo", "onnx", "ao", "_numpy"}
ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2013": "-",
                       "\u2014": "--", "\u00a0": " ", "\u2192": "->", "\t": "    "})


@dataclass(frozen=True)
class Document:
    """One documented thing: its dotted name ("" for prose), what it is ("class", "module", …), and the cleaned text."""

    name: str
    kind: str
    body: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.body)

    def texts(self) -> Iterator[str]:
        """What the base reads: the text in pieces under its name and, for a named thing, its summary as an answer."""
        heading = f"{self.name}\n\n" if self.name else ""
        for piece in pieces(self.body):
            yield heading + piece
        if question := self.question():
            yield question

    def question(self) -> str | None:
        """The first paragraph as the answer to a question in the form that the demo asks in, or None without one."""
        summary = " ".join(self.body.split("\n\n")[0].split())
        if not self.name or not re.fullmatch(r"[A-Z][^|=<>{}]{20,240}\.", summary):
            return None
        asked = f"What does {self.name} do?" if self.kind == "function" else f"What is {self.name}?"
        return f"Question: {asked}\nAnswer: {summary}"


def is_held_out(body: str) -> bool:
    """Whether a document belongs to the held-out part; equal bodies always fall on the same side."""
    return int(hashlib.sha256(body.encode()).hexdigest()[:12], 16) % HELD_OUT_ONE_IN == 0


def pieces(body: str) -> list[str]:
    """`body` cut between paragraphs into pieces of at most PIECE_CHARS; a longer paragraph stays whole."""
    out = [""]
    for paragraph in body.split("\n\n"):
        if out[-1] and len(out[-1]) + len(paragraph) + 2 > PIECE_CHARS:
            out.append("")
        out[-1] = f"{out[-1]}\n\n{paragraph}" if out[-1] else paragraph
    return out


def clean(text: str) -> str:
    """Plain text: typographic signs as ASCII, reStructuredText roles resolved, tables and printed numbers left out."""
    text = inspect.cleandoc(text.translate(ASCII))
    text = re.sub(r"^\.\. (note|warning|tip|seealso)::[ ]*", lambda m: m[1].capitalize() + ": ", text, flags=re.M)
    text = re.sub(r"^\s*\.\. .*$", "", text, flags=re.M)
    text = re.sub(r":[a-z:]+:`~?([^`<]*?)(?: <[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`{1,2}([^`\n]*)`{1,2}_?", r"\1", text)
    text = re.sub(r"[ ]+$", "", text, flags=re.M)
    kept = [paragraph.rstrip() for paragraph in re.split(r"\n{2,}", text) if _is_prose(paragraph)]
    return "\n\n".join(kept).strip("\n")


def _is_prose(paragraph: str) -> bool:
    shown = re.sub(r"\s", "", paragraph)
    letters = sum(char.isascii() and char.isalpha() for char in shown)
    return bool(shown) and len(paragraph) <= 2 * PIECE_CHARS and letters >= 0.8 * len(shown)


def _parsed(source: str, module: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, kind, docstring) of everything documented in one Python file, in the file's order."""
    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}"
                if text := ast.get_docstring(child):
                    yield inner, "class" if isinstance(child, ast.ClassDef) else "function", text
                yield from walk(child, inner)

    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield module, "module", text
    yield from walk(tree, module)


def _folder(root: Path, prefix: str, skipped: set[str], owner: str) -> Iterator[tuple[str, str, str]]:
    """Docstrings of every file below `root`, sorted; files that name a copyright holder other than `owner` are left."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped & set(parts) or any(part.startswith("config-") for part in parts):
            continue
        try:
            source = path.read_text("utf-8")
            found = list(_parsed(source, ".".join((*prefix.split(), *parts)).removesuffix(".__init__")))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files kept broken on purpose, and templates
        if not re.search(rf"copyright(?!.*(?:{owner}))", source, flags=re.I):
            yield from found


def _compiled(module: str, kinds: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str, str]]:
    """Docstrings of functions and methods written in C, which only a live module can show."""
    loaded = importlib.import_module(module)
    owners = [getattr(loaded, kind) if kind else loaded for kind in kinds]
    owners += [value for _, value in sorted(vars(loaded).items()) if inspect.isclass(value)] if kinds == ("",) else []
    for owner in owners:
        for name, value in sorted(vars(owner).items()):
            text = getattr(value, "__doc__", None)
            if isinstance(text, str) and not name.startswith("_") and inspect.isroutine(value):
                inside = f".{owner.__name__}" if inspect.isclass(owner) else ""
                yield f"{module.removeprefix('builtins')}{inside}.{name}".strip("."), "function", text


def _raw() -> Iterator[tuple[str, str, str]]:
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield "", "topic", re.sub(r"^[*=~^-]{3,}$", "", text, flags=re.M)
    yield from _folder(Path(sysconfig.get_paths()["stdlib"]), "", STDLIB_SKIPPED, "Python Software Foundation|PSF")
    for name in sorted(name for name in sys.builtin_module_names if not name.startswith("_")):
        yield from _compiled(name)
    import torch

    yield from _compiled("torch", ("", "Tensor"))
    yield from _folder(Path(torch.__file__).parent, "torch", TORCH_SKIPPED, "Facebook|Meta|PyTorch")


def documents() -> list[Document]:
    """Every document once (equal bodies are one), in a fixed order for one version of Python and torch."""
    seen: set[str] = set()
    out = []
    for name, kind, text in _raw():
        body = clean(text)
        key = " ".join(body.split()).lower()
        if len(body) < SHORTEST or key in seen or "copyright" in key:
            continue
        seen.add(key)
        public = name and not re.search(r"(^|\.)_", name)
        out.append(Document(name if public else "", kind, body))
    return out


def split(found: list[Document]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts). A document's pieces and its question fall on the same side."""
    train = [text for document in found if not document.held_out for text in document.texts()]
    held = [text for document in found if document.held_out for text in document.texts()]
    seen = set(train)
    return train, [text for text in held if text not in seen]
