"""The files that many tests read: a tiny checkpoint, questions about squares as JSONL, and records of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import minitune as mt

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BASE = EXAMPLES / "base"
"""The small model of the demo, whose tokenizer the tiny checkpoint has too."""


def write_tiny(folder: Path) -> Path:
    """A checkpoint of random weights in the shape `tiny`; `folder` must not exist or be empty."""
    mt.init("tiny", folder, tokenizer=BASE, seed=1)
    return folder


def write_numbers(path: Path, numbers: Iterable[int], prompt: str = "prompt", completion: str = "completion") -> Path:
    """A sample for each number, which asks for its square, under these names of fields."""
    path.write_text("".join(json.dumps({prompt: f"Number {i} is", completion: f" {i * i}."}) + "\n" for i in numbers))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """name -> (bytes, time of the last change) of all that lies in `folder`."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}
